"""python benchmarks/data.py --json: what a sample costs on its way from disk to the model, beside named peers.

Photos of scikit-image in several sizes, as JPEG and PNG, and digits make InternVL's JSONL. All is measured in one run,
kinds taking turns, as the least CPU time of a few repetitions with one thread; workers by the clock.

* tiles: transformers' own processors for the same tiling, of which the values are compared too
* one square a sample, as LLaVA has it: XTuner's LLaVADataset, its start-up, memory and samples
* resuming: MMEngine's loop, which reads again all that was seen
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from training import REPOSITORY, machine

from xtuner_ext import autoload

autoload.install()

SIZES = ((448, 448), (640, 480), (1024, 768), (900, 1600), (1920, 1080), (3000, 2000))
MAX_TILES, TILE, SQUARE = 12, 448, 336
# Ours over theirs; levels of 255 at most; seconds late over seconds early.
TILES_BAR, PILLOW_BAR, EQUAL_BAR, LLAVA_BAR, START_BAR, MEMORY_BAR = 1.0, 1.0, 1e-5, 1.0, 1.0, 1.0
STEPS_BAR, RESUME_BAR, REFETCH_BAR = 4.5, 1.5, 0.1
EARLY, LATE, REFETCHED = 10, 10_000, 1_000


def main():
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="of every measurement, the least is taken")
    parser.add_argument("--lines", type=int, default=10_000, help="annotation lines of the start-up measurement")
    parser.add_argument("--json", action="store_true", help="end with one line of claims as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        photos = write_photos(folder)
        found = {**tiling(photos, args.repeats), **squares(folder, photos, args)}
        pipeline(folder, photos)
        found.update(resuming(folder, args.repeats))
    print(f"\n{machine()}")
    if args.json:
        print(json.dumps({"machine": machine(), "claims": claims(found)}))


def write_photos(folder):
    """list[Path]: Photos of every size, as JPEG and as PNG."""
    import skimage.data

    sources = [Image.fromarray(getattr(skimage.data, name)()) for name in ("astronaut", "chelsea", "coffee", "rocket")]
    paths = []
    for number, size in enumerate(SIZES):
        photo = sources[number % len(sources)].resize(size, Image.Resampling.LANCZOS)
        for suffix, options in (("jpg", {"quality": 90}), ("png", {"compress_level": 1})):
            paths.append(folder / f"photo_{size[0]}x{size[1]}.{suffix}")
            photo.save(paths[-1], **options)
    return paths


def least(function, repeats):
    """float: Least CPU seconds of a call."""
    times = []
    for _ in range(repeats):
        begun = time.process_time()
        function()
        times.append(time.process_time() - begun)
    return min(times)


def processor(**options):
    """HybridVLProcessor: With the digits' tokenizer."""
    from xtuner_ext.convert.teacher import load_processor
    from xtuner_ext.modeling.processing import HybridVLProcessor

    tokenizer = load_processor("digits-teacher").tokenizer
    settings = {"image_size": TILE, "tokens_per_tile": 256, "max_tiles": MAX_TILES, **options}
    return HybridVLProcessor(tokenizer, **settings)


def tiling(photos, repeats):
    """dict: CPU seconds of all photos, opened and cut by each processor, and how far values are apart."""
    from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    from xtuner_ext.data.dataset import open_image
    from xtuner_ext.modeling.processing import NORMALISATION

    mean, std = (list(values) for values in NORMALISATION["imagenet"])
    options = dict(crop_to_patches=True, max_patches=MAX_TILES, image_mean=mean, image_std=std)
    options["size"] = {"height": TILE, "width": TILE}
    theirs, pillows, ours = GotOcr2ImageProcessor(**options), GotOcr2ImageProcessorPil(**options), processor()
    kinds = {
        "xtuner_ext": ours.tiles,
        "transformers (torchvision)": lambda image: theirs(images=[image], return_tensors="pt")["pixel_values"],
        "transformers (Pillow)": lambda image: pillows(images=[image], return_tensors="pt")["pixel_values"],
    }
    seconds = {name: {True: 0.0, False: 0.0} for name in kinds}
    tiles, apart, steps = 0, 0.0, 0.0
    for path in photos:
        image = open_image(path, str(path))
        values = {name: kind(image) for name, kind in kinds.items()}
        tiles += len(values["xtuner_ext"])
        first, default, pillow = values.values()
        apart = max(apart, (first - default).abs().max().item())
        steps = max(steps, ((first - pillow) * torch.tensor(std).view(3, 1, 1) * 255).abs().max().item())
        for name, kind in kinds.items():
            seconds[name][True] += least(lambda kind=kind, path=path: kind(open_image(path, str(path))), repeats)
            seconds[name][False] += least(lambda kind=kind, image=image: kind(image), repeats)
    print(f"| {len(photos)} photos, {tiles} tiles of {TILE} pixels | tiles/s, from the file | from the decoded image |")
    print("|---|---:|---:|")
    for name, spent in seconds.items():
        print(f"| {name} | {tiles / spent[True]:,.0f} | {tiles / spent[False]:,.0f} |")
    print(f"\nvalues differ from torchvision's by {apart:.1e}, from Pillow's by {steps:.1f} of 255 at most\n")
    first, default, pillow = (spent[True] for spent in seconds.values())
    return {"tiles": default / first, "tiles_pillow": pillow / first, "apart": apart, "steps": steps}


def write_lines(folder, name, images, count):
    """Path: A meta file over ``count`` lines that ask about images in turn."""
    with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
        for number in range(count):
            turns = [
                {"from": "human", "value": f"<image>\nWhat is there in picture {number}?"},
                {"from": "gpt", "value": f"It is picture {number}, and there is much to be seen in it."},
            ]
            line = {"id": str(number), "image": images[number % len(images)].name, "conversations": turns}
            file.write(json.dumps(line) + "\n")
    entry = {"root": ".", "annotation": f"{name}.jsonl", "data_augment": False, "repeat_time": 1, "length": count}
    (folder / f"{name}.json").write_text(json.dumps({name: entry}))
    return folder / f"{name}.json"


def open_ours(meta):
    """ConversationDataset: One padded square a sample."""
    from xtuner_ext.data.dataset import ConversationDataset

    squared = processor(image_size=SQUARE, tokens_per_tile=576, fit="pad", normalisation="clip")
    return ConversationDataset(meta, squared, "internlm2_chat", max_length=2048)


def open_xtuners(meta):
    """LLaVADataset: The same with XTuner."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from xtuner.dataset import LLaVADataset
    from xtuner.dataset.map_fns import llava_map_fn, template_map_fn_factory
    from xtuner.utils import PROMPT_TEMPLATE

    size = {"height": SQUARE, "width": SQUARE}
    return LLaVADataset(
        image_folder=str(meta.parent),
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SQUARE}, crop_size=size),
        data_path=str(meta.with_suffix(".jsonl")),
        tokenizer=processor().tokenizer,
        dataset_map_fn=llava_map_fn,
        template_map_fn=dict(type=template_map_fn_factory, template=PROMPT_TEMPLATE.internlm2_chat),
        max_length=2048,
        pad_image_to_square=True,
    )


def _start(kind, meta, pipe):
    """In a process of its own: seconds and MiB that opening takes, then seconds of a sample."""
    import datasets

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    # What both import is not the dataset's cost, so a small one is opened before.
    kind(meta.with_name("few.json"))
    before, resident, begun = resource.getrusage(resource.RUSAGE_CHILDREN), memory(), time.process_time()
    dataset = kind(meta)
    opened, after = time.process_time() - begun, memory()
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    # XTuner maps over its lines in 32 processes.
    opened += children.ru_utime + children.ru_stime - before.ru_utime - before.ru_stime
    chosen = np.linspace(0, len(dataset) - 1, 24).astype(int).tolist()
    sample = least(lambda: [dataset[index] for index in chosen], 3) / len(chosen)
    pipe.send((opened, max(0.0, after - resident), sample))


def memory():
    """float: MiB that this process holds and shares with none."""
    for line in open("/proc/self/smaps_rollup"):
        if line.startswith("Private_Dirty"):
            return int(line.split()[1]) / 1024
    return 0.0


def squares(folder, photos, args):
    """dict: Start-up, memory and samples of XTuner's LLaVADataset over ours."""
    small = [path for path in photos if "x480" in path.name or "448x" in path.name]
    write_lines(folder, "few", small, 4)
    meta = write_lines(folder, "many", small, args.lines)
    found = {}
    for name, kind in (("xtuner_ext", open_ours), ("XTuner's LLaVADataset", open_xtuners)):
        ours, theirs = get_context("spawn").Pipe(duplex=False)
        process = get_context("spawn").Process(target=_start, args=(kind, meta, theirs))
        process.start()
        # So that a process that failed ends the wait.
        theirs.close()
        try:
            found[name] = ours.recv()
        except EOFError:
            sys.exit(f"measuring {name} failed")
        process.join()
    what = f"{args.lines:,} lines, one square of {SQUARE} pixels a sample"
    print(f"| {what} | start, CPU s | private memory, MiB | sample, CPU ms |")
    print("|---|---:|---:|---:|")
    for name, (opened, held, sample) in found.items():
        print(f"| {name} | {opened:.2f} | {held:.1f} | {1000 * sample:.1f} |")
    print()
    first, second = found.values()
    return {"start": second[0] / first[0], "memory": second[1] / max(1.0, first[1]), "square": second[2] / first[2]}


def pipeline(folder, photos):
    """Print the throughput of whole samples: by CPU time in this process, by the clock with one worker and with two."""
    from torch.utils.data import DataLoader

    from xtuner_ext.data.collate import conversation_collate
    from xtuner_ext.data.dataset import ConversationDataset
    from xtuner_ext.data.sources.digits import make_digits

    metas = make_digits(folder / "digits", seed=0, train=600, test=1)
    meta = write_lines(folder, "photos", photos, 4 * len(photos))
    kinds = {
        "photos": ConversationDataset(meta, processor(), "internlm2_chat"),
        "digits": ConversationDataset(metas["train"], digits_processor(), "internlm2_chat"),
    }
    print("| samples | read by | samples/s | tiles/s |\n|---|---|---:|---:|")
    for name, dataset in kinds.items():
        for workers, reader in enumerate(("this process, by CPU time", "one worker", "two workers")):
            options = dict(num_workers=workers, persistent_workers=workers > 0)
            clock = time.perf_counter if workers else time.process_time
            loader = DataLoader(dataset, 4, collate_fn=conversation_collate, **options)
            # Once to start the workers.
            for _ in loader:
                pass
            best = 0.0, 0.0
            for _ in range(2):
                begun, tiles = clock(), 0
                for batch in loader:
                    tiles += len(batch["data"]["pixel_values"])
                seconds = clock() - begun
                best = max(best, (len(dataset) / seconds, tiles / seconds))
            print(f"| {name} | {reader} | {best[0]:,.1f} | {best[1]:,.0f} |")
    print()


def digits_processor():
    """HybridVLProcessor: The shipped digits teacher's."""
    from xtuner_ext.convert.teacher import load_processor

    return load_processor("digits-teacher")


def resuming(folder, repeats):
    """dict: Seconds to the first batch after an interruption, late over early, and over MMEngine's way."""
    from mmengine.dataset import InfiniteSampler
    from mmengine.runner.loops import _InfiniteDataloaderIterator
    from torch.utils.data import DataLoader

    from xtuner_ext.data.collate import conversation_collate
    from xtuner_ext.data.dataset import ConversationDataset
    from xtuner_ext.data.samplers import ResumableInfiniteSampler

    dataset, size = ConversationDataset(folder / "digits" / "train.json", digits_processor(), "internlm2_chat"), 4

    def batches(sampler):
        return _InfiniteDataloaderIterator(DataLoader(dataset, size, sampler=sampler, collate_fn=conversation_collate))

    def ours(iteration):
        sampler = ResumableInfiniteSampler(dataset, seed=0)
        sampler.skip(iteration * size)
        return next(batches(sampler))

    def mmengines(iteration):
        iterator = batches(InfiniteSampler(dataset, seed=0))
        # As mmengine's IterBasedTrainLoop.run does.
        for _ in range(iteration):
            next(iterator)
        return next(iterator)

    seconds = {name: [] for name in ("early", "late", "refetched", "skipped")}
    for _ in range(repeats):
        seconds["early"].append(least(lambda: ours(EARLY), 20))
        seconds["late"].append(least(lambda: ours(LATE), 20))
        seconds["skipped"].append(least(lambda: ours(REFETCHED), 20))
    seconds["refetched"].append(least(lambda: mmengines(REFETCHED), 1))
    values = {name: statistics.median(times) for name, times in seconds.items()}
    print("| first batch after resuming at iteration | CPU ms |\n|---|---:|")
    for name, iteration in (("early", EARLY), ("skipped", REFETCHED), ("late", LATE)):
        print(f"| {iteration:,}, xtuner_ext | {1000 * values[name]:.1f} |")
    print(f"| {REFETCHED:,}, MMEngine | {1000 * values['refetched']:,.1f} |")
    return {"late": values["late"] / values["early"], "refetched": values["skipped"] / values["refetched"]}


def claims(found):
    """list[dict]: ``name``, ``value``, ``bar`` and ``holds`` of each claim."""
    most = [
        (f"seconds to resume at iteration {LATE:,} over {EARLY}", found["late"], RESUME_BAR),
        (f"seconds to resume at iteration {REFETCHED:,} over MMEngine's", found["refetched"], REFETCH_BAR),
        ("tiles differ from transformers' (torchvision)", found["apart"], EQUAL_BAR),
        ("tiles differ from transformers' (Pillow), steps of 255", found["steps"], STEPS_BAR),
    ]
    fewest = [
        ("tiles/s over transformers' (torchvision)", found["tiles"], TILES_BAR),
        ("tiles/s over transformers' (Pillow)", found["tiles_pillow"], PILLOW_BAR),
        ("XTuner's LLaVADataset over ours: seconds to start", found["start"], START_BAR),
        ("XTuner's LLaVADataset over ours: memory after start", found["memory"], MEMORY_BAR),
        ("XTuner's LLaVADataset over ours: seconds of a sample", found["square"], LLAVA_BAR),
    ]
    return [
        *({"name": name, "value": value, "bar": bar, "holds": value <= bar} for name, value, bar in most),
        *({"name": name, "value": value, "bar": bar, "holds": value >= bar} for name, value, bar in fewest),
    ]


if __name__ == "__main__":
    main()
