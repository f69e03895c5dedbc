"""xtuner-ext chat DIR [--image FILE] [--prompt TEXT]: talk to a teacher, a student, or a LLaVA in XTuner's parts."""

import argparse
import io
import logging
import re
import sys
from pathlib import Path

from ..errors import UserError


def parse_args(argv):
    """Parse the options of stock ``xtuner chat``, plus ``--prompt``."""
    parser = argparse.ArgumentParser(
        prog="xtuner-ext chat",
        description="Talk to a model folder. A blank line ends a question; EXIT leaves, RESET forgets.",
        epilog="example: xtuner-ext chat work_dirs/digits/export_linear --image x.png --prompt 'Is there a 7?'",
    )
    parser.add_argument("model_name_or_path", help="folder of a student or of a supported teacher")
    parser.add_argument("--llava", help="folder that `convert pth_to_hf` made of a LLaVA with this language model")
    parser.add_argument("--visual-encoder", help="with --llava: folder of the vision tower, where it was not tuned")
    parser.add_argument("--visual-select-layer", type=int, default=-2, help="with --llava: layer of the tower to read")
    parser.add_argument("--adapter", help="folder of an adapter that was tuned beside this model")
    parser.add_argument("--image", action="append", default=[], help="image of the first question; may be repeated")
    parser.add_argument("--prompt", help="ask this once, print the answer and leave")
    parser.add_argument("--prompt-template", help="conversation template (default: the model's own)")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--torch-dtype", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
    parser.add_argument("--bot-name", default="BOT")
    parser.add_argument("--no-streamer", action="store_true", help="print an answer when it is complete")
    parser.add_argument("--stop-words", nargs="+", default=[])
    parser.add_argument("--max-new-tokens", type=int, default=2048)
    parser.add_argument("--prefill-chunk-size", type=int, help="tokens read at a time from a long prompt")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 always takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=40)
    parser.add_argument("--top-p", type=float, default=0.75)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--trust-remote-code", action="store_true", help="run the folder's own tokenizer code")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def belongs_to_stock(argv):
    """bool: Whether the command line names a model or option that only stock ``xtuner chat`` handles."""
    stock_only = {"--bits", "--with-plugins", "--lagent", "--offload-folder", "--system-template"}
    if any(word.split("=", 1)[0] in stock_only for word in argv):
        return True
    if {"-h", "--help"} & set(argv):
        return False
    args = parse_args(argv)
    positional = args.model_name_or_path
    if args.adapter is not None and not (Path(args.adapter) / "base_model.json").is_file():
        # Of XTuner's own, for models in their own classes.
        return True
    from ..convert.teacher import read_model_config, resolve_folder

    folder = resolve_folder(positional)
    if not folder.is_dir():
        # A name on a hub, which stock chat downloads; anything else is a path that does not exist.
        return re.fullmatch(r"[\w.-]+/[\w.-]+", positional) is not None and not folder.parent.is_dir()
    try:
        read_model_config(folder)
    except UserError:
        # A folder that stock chat may know, as long as it is a model at all.
        return (folder / "config.json").is_file()
    return False


def main(argv):
    """Run the verb.

    Args:
        argv (list[str]): Arguments after the verb.

    Returns:
        int: Exit status.
    """
    if belongs_to_stock(argv):
        from .main import run_stock

        return run_stock("chat", argv)
    args = parse_args(argv)
    import torch
    from transformers import TextStreamer

    from .loading import choose_template, load_model
    from .session import ChatSession

    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(args.seed)
    images = [open_picture(path) for path in args.image]
    if args.llava is None:
        if args.visual_encoder is not None:
            raise UserError(f"--visual-encoder {args.visual_encoder} is a part of a LLaVA, whose folder --llava names")
        model, processor = load_model(
            args.model_name_or_path,
            args.torch_dtype,
            trust_remote_code=args.trust_remote_code,
            adapter=args.adapter,
        )
        _, template = choose_template(args.prompt_template, model, processor, args.model_name_or_path)
    else:
        from .llava import llava_template, load_llava_model

        model, processor = load_llava_model(args)
        template = llava_template(args.prompt_template, model, processor, args.model_name_or_path)
    if images and model.config.vision is None:
        raise UserError(f"{args.model_name_or_path} has no image front end, --image can not be used")
    words = tuple(args.stop_words)
    session = ChatSession(model, processor, template, args.system, words)
    generation = dict(
        max_new_tokens=args.max_new_tokens,
        repetition_penalty=args.repetition_penalty,
        prefill_chunk_size=args.prefill_chunk_size,
        do_sample=args.temperature > 0,
    )
    if words := words_of_several_tokens((*template.stop_words, template.suffix, *words), processor.tokenizer):
        generation.update(stop_strings=words, tokenizer=processor.tokenizer)
    if args.temperature > 0:
        generation.update(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)

    def ask(text, new_images, stream):
        streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
        try:
            answer = session.ask(text, new_images, streamer=streamer, **generation)
        except ValueError as error:
            raise UserError(f"the question can not be asked: {error}") from error
        if not stream:
            sys.stdout.write(answer + "\n")
            sys.stdout.flush()

    if args.prompt is not None:
        ask(args.prompt, images, stream=False)
        return 0
    return converse(ask, session, images, args.bot_name, stream=not args.no_streamer)


def open_picture(source):
    """PIL.Image.Image: A picture from a file or an http address; UserError where there is none."""
    from ..data.dataset import open_image

    if not source.startswith(("http://", "https://")):
        return open_image(Path(source), "--image")
    import requests

    try:
        answer = requests.get(source, timeout=30)
        answer.raise_for_status()
    except requests.RequestException as error:
        raise UserError(f"--image {source} can not be fetched: {error}") from error
    return open_image(io.BytesIO(answer.content), f"--image {source}")


def words_of_several_tokens(words, tokenizer):
    """list[str]: Those of some stop words that are no single token, and so have to be looked for in the text."""
    return sorted({word for word in words if len(tokenizer(word, add_special_tokens=False).input_ids) > 1})


def converse(ask, session, images, bot_name, stream):
    """Read questions from standard input until EXIT or its end.

    Args:
        ask (callable): Takes text, images of this turn, and whether to stream.
        session (ChatSession): The conversation that ``ask`` continues.
        images (list): Images of the first question, also after a reset.
        bot_name (str): Shown before answers.
        stream (bool): Print tokens as they come.

    Returns:
        int: Exit status.
    """
    waiting = list(images)
    while True:
        text = read_question()
        if text is None or text == "EXIT":
            sys.stdout.write("Log: Exit!\n")
            return 0
        if text == "RESET":
            session.reset()
            waiting = list(images)
            sys.stdout.write("Log: History responses have been removed!\n")
            continue
        if not text:
            continue
        sys.stdout.write(f"{bot_name}: ")
        sys.stdout.flush()
        try:
            ask(text, waiting, stream)
        except UserError as error:
            # One bad question does not end the conversation; the pictures are still to come if it was the first.
            sys.stderr.write(f"\nxtuner-ext: error: {error}\n")
            waiting = list(images) if session.ids.shape[1] == 0 else []
            continue
        waiting = []


def read_question():
    """str | None: Lines up to a blank one; None at the end of input."""
    sys.stdout.write("\ndouble enter to end input (EXIT: exit chat, RESET: reset history) >>> ")
    sys.stdout.flush()
    lines = []
    for line in sys.stdin:
        line = line.rstrip("\n")
        if not line:
            return "\n".join(lines)
        lines.append(line)
    return "\n".join(lines) if lines else None


if __name__ == "__main__":
    from xtuner_ext.cli.main import run

    sys.exit(run(["chat", *sys.argv[1:]]))
