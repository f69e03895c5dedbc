"""xtuner-ext data show META.json --index N: a sample as the model sees it."""

import contextlib
import io
import re
from pathlib import Path

from .data_check import add_model_options, frame_settings, load_for_data

# Written into the pictures, so that they may be replaced and no others.
SOFTWARE = "xtuner-ext data show"
TRAINED, GIVEN, VISUAL = "bold green", "default", "cyan"
# Around what is trained where there are no colours.
OPEN, CLOSE = "{+", "+}"


def add_parser(verbs):
    """Add the verb.

    Args:
        verbs (argparse._SubParsersAction): Verbs of ``xtuner-ext data``.
    """
    parser = verbs.add_parser(
        "show",
        help="a sample as the model sees it",
        description="Print a sample's tokens, coloured by whether they are trained, and draw its tiles. Without "
        "--model it is shown with InternVL2's tiles and template.",
        epilog="example: xtuner-ext data show work_dirs/digits/data/train.json --index 0 --model digits-teacher",
    )
    parser.add_argument("meta", metavar="META.json", help="the meta file of the datasets")
    parser.add_argument(
        "--index", type=int, required=True, metavar="N", help="number of the line, from 0, over all datasets"
    )
    add_model_options(parser)
    parser.add_argument("--out", metavar="FILE.png", help="picture of the tiles (default: META-N.png, here)")
    parser.set_defaults(run=run)


def run(args):
    """Run the verb.

    Args:
        args (argparse.Namespace): Its options.

    Returns:
        int: Exit status.
    """
    from ..data.sheet import contact_sheet
    from ..data.show import load_sample, spans

    if args.model is None:
        processor, name = _internvl2(args)
    else:
        processor, name, _, _ = load_for_data(args)
    with _quiet():
        sample, record, groups = load_sample(args.meta, args.index, processor, name, frame_settings(args.frames))
    picture = None
    if groups:
        picture = _free_path(args.out or f"{re.sub(r'[^A-Za-z0-9_.-]', '_', Path(args.meta).stem)}-{args.index}.png")
        _save(contact_sheet(sample["pixel_values"], groups, processor.normalisation), picture)
    print_sample(record, spans(sample, processor), groups, picture, name, args.model)
    return 0


@contextlib.contextmanager
def _quiet():
    """Other lines' faults are of no interest here."""
    from mmengine.logging import MMLogger

    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel("ERROR")
    try:
        yield
    finally:
        logger.setLevel(level)


def _internvl2(args):
    """tuple[HybridVLProcessor, str]: InternVL2's tiling, with a tokenizer that has its special tokens."""
    from ..convert.teacher import load_processor
    from ..modeling.processing import HybridVLProcessor

    processor = HybridVLProcessor(load_processor("digits-teacher").tokenizer)
    processor.max_tiles = args.max_tiles or processor.max_tiles
    return processor, args.prompt_template or "internlm2-chat"


def _free_path(out):
    from PIL import Image

    from ..errors import UserError

    path = Path(out)
    if path.suffix.lower() != ".png":
        raise UserError(f"--out is {out}, expected a name that ends with .png")
    if path.exists():
        try:
            with Image.open(path) as image:
                ours = image.info.get("Software") == SOFTWARE
        except OSError:
            ours = False
        if not ours:
            raise UserError(f"{path} exists and was not written by `{SOFTWARE}`: choose another name with --out")
    return path


def _save(picture, path):
    from PIL.PngImagePlugin import PngInfo

    from ..compat import replace_file
    from ..errors import UserError

    note, content = PngInfo(), io.BytesIO()
    note.add_text("Software", SOFTWARE)
    picture.save(content, "PNG", pnginfo=note)
    try:
        replace_file(path, content.getvalue())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error


def print_sample(record, spans, groups, picture, template, model):
    """Print a sample.

    Args:
        record (Record): Its annotation.
        spans (list[Span]): Its tokens.
        groups (list[tuple]): Its images' tiles.
        picture (Path | None): Where they were drawn.
        template (str): Name of the template.
        model (str | None): The model that it is shown for.
    """
    from rich.text import Text

    from .console import console

    screen = console()
    coloured = bool(screen.color_system) and screen.is_terminal and not screen.no_color
    screen.print(Text(f"{record.where}  ({record.kind})", style="bold"), soft_wrap=True)
    body = Text()
    for span in spans:
        text = f"{span.text} x {span.count}" if span.visual else span.text
        if span.trained and not coloured:
            text = f"{OPEN}{text}{CLOSE}"
        body.append(text, style=TRAINED if span.trained else VISUAL if span.visual else GIVEN)
    screen.print(body, soft_wrap=True)
    trained = sum(span.count for span in spans if span.trained)
    visual = sum(span.count for span in spans if span.visual)
    total = sum(span.count for span in spans)
    legend = Text()
    legend.append(f"trained {trained}" if coloured else f"{OPEN}trained{CLOSE} {trained}", style=TRAINED)
    legend.append(f"  visual {visual}", style=VISUAL)
    legend.append(f"  other {total - trained - visual}", style=GIVEN)
    legend.append(f"  in all {total} tokens" if model else "  (tokens of a stand-in: --model tells the true ones)")
    screen.rule()
    screen.print(legend, soft_wrap=True)
    facts = [f"template {template}", f"model {model or 'InternVL2, without its tokenizer'}"]
    if groups:
        counts = " + ".join(str(count) for count, _, _ in groups)
        facts.append(f"tiles {counts}, drawn in {picture}")
    screen.print(Text(", ".join(facts)), soft_wrap=True)
