"""python benchmarks/data_check.py --json: seconds and memory of `xtuner-ext data check` over a million lines.

The lines are conversations of one to three turns, 430 bytes each on average, of words of this repository's own pages;
half of them name an image. The command runs as a user runs it, with a process for every processor and exact lengths in
tokens; memory is the sum over its processes, pages that they share counted once (PSS), sampled four times a second. By
CPU time it is compared with ``ConversationDataset``, which tokenizes sample by sample, and whose lengths it must give.
Headers, of photos of 448 to 3000 pixels as JPEG and PNG that lie in the page cache, are timed as what they add.
"""

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data import write_photos
from training import REPOSITORY, machine

SECONDS_BAR, MEMORY_BAR, HEADERS_BAR, SPEED_BAR = 60.0, 500.0, 1000.0, 2.0
COMPARED = 5_000  # lines
NAMES = 100_000  # image files of the million lines


def main():
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--images", type=int, default=20_000, help="image files whose headers are read")
    parser.add_argument("--model", default="digits-teacher", help="model folder whose tokenizer counts")
    parser.add_argument("--json", action="store_true", help="end with one line of claims as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        photos = write_photos(folder)
        meta = write_lines(folder, "many", args.lines, photos, NAMES)
        found, report = check(meta, args.model, "--no-images")
        few = write_lines(folder, "few", COMPARED, photos, 500)
        pictures = write_lines(folder, "pictures", 2 * args.images, photos, args.images)
        found.update(compare(few, pictures, args.model, args.images))
    total, share = report["total"], os.cpu_count()
    found["share"] = found["cpu"] / share
    found["own"] = 1e6 * found["cpu"] / args.lines
    print(f"| {total['lines']:,} lines, {total['tokens_per_epoch']:,} tokens of {args.model} | |\n|---|---:|")
    print(f"| seconds, {share} processors | {found['seconds']:.1f} |")
    print(f"| CPU seconds a processor | {found['share']:.1f} |")
    print(f"| memory of all processes, MB | {found['memory']:.0f} |")
    print(f"| CPU microseconds a line, the start included | {found['own']:.0f} |")
    print(f"| ConversationDataset's | {found['peer']:.0f} |")
    print(f"| images whose headers are read, a CPU second | {found['headers']:,.0f} |")
    print(f"\n{machine()}")
    if args.json:
        print(json.dumps({"machine": machine(), "claims": claims(found, args.lines)}))


def write_lines(folder, name, count, photos, images):
    """Path: A meta file over conversations; every second one has one of ``images`` names of the photos."""
    generator = random.Random(0)
    pages = "".join(path.read_text(encoding="utf-8") for path in sorted(REPOSITORY.glob("*/**/README.md")))
    words = re.findall(r"[A-Za-z]+[,.:;]?", pages)
    (folder / name).mkdir()
    for number in range(images):
        os.link(photos[number % len(photos)], folder / name / f"{number:06d}{photos[number % len(photos)].suffix}")
    files = sorted(path.name for path in (folder / name).iterdir())
    with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
        for number in range(count):
            turns = []
            for _ in range(generator.choice((1, 1, 1, 2, 3))):
                question, answer = (generator.choices(words, k=generator.randint(*k)) for k in ((4, 20), (1, 30)))
                turns.append({"from": "human", "value": f"{' '.join(question)} {number}?"})
                turns.append({"from": "gpt", "value": " ".join(answer)})
            line = {"id": number, "conversations": turns}
            if number % 2:
                line["image"] = f"{name}/{files[number // 2 % len(files)]}"
                turns[0]["value"] = "<image>\n" + turns[0]["value"]
            file.write(json.dumps(line) + "\n")
    (folder / f"{name}.json").write_text(json.dumps({name: {"annotation": f"{name}.jsonl", "length": count}}))
    return folder / f"{name}.json"


def check(meta, model, *options):
    """tuple[dict, dict]: ``seconds``, ``cpu`` seconds and ``memory`` in MB of the command, and its report."""
    out = meta.with_suffix(".report.json")
    command = [sys.executable, "-m", "xtuner_ext.cli", "data", "check", str(meta), "--model", model, "--json", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    before, begun, peak = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([*command, *options], env=environment, stdout=said, stderr=said)
        while process.poll() is None:
            peak = max(peak, sum(map(proportional_memory, family(process.pid))))
            time.sleep(0.25)
        seconds, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
        if process.returncode:
            said.seek(0)
            sys.exit(f"{' '.join(command)}\nended with status {process.returncode}:\n{said.read().decode()[-3000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu": cpu, "memory": peak / 1e6}, json.loads(out.read_text())


def family(pid):
    """list[int]: A process and those that it started."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(other for child in children for other in family(int(child)))]


def proportional_memory(pid):
    """int: Bytes of a process, shared pages divided among those that share them."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        # It has ended.
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def compare(meta, pictures, model, images):
    """dict: In this process, by CPU time, ``peer`` microseconds of a line with ConversationDataset, ``tokens_apart``
    that the two count differently, and ``headers`` of images read in a second.
    """
    from xtuner_ext import autoload

    autoload.install()
    from xtuner_ext.convert.teacher import load_processor, read_model_config, resolve_folder
    from xtuner_ext.data.check import check_meta
    from xtuner_ext.data.dataset import ConversationDataset
    from xtuner_ext.data.template_fit import detect_template, fit_template

    processor = load_processor(model)
    name = read_model_config(resolve_folder(model))[1].template or detect_template(processor.tokenizer)
    template = fit_template(name, processor.tokenizer)
    begun = time.process_time()
    dataset = ConversationDataset(meta, processor, name)
    tokens = [dataset.count_tokens(0, line) for line in range(len(dataset))]
    spent = time.process_time() - begun
    ours = check_meta(meta, processor, template, jobs=1)["datasets"][0]["tokens"]
    apart = max(abs(ours[key] - value(tokens)) for key, value in (("sum", sum), ("min", min), ("max", max)))
    times = {}
    for headers in (False, True):
        begun = time.process_time()
        check_meta(pictures, processor, template, images=headers, jobs=1)
        times[headers] = time.process_time() - begun
    return {"peer": 1e6 * spent / len(dataset), "tokens_apart": apart, "headers": images / (times[True] - times[False])}


def claims(found, lines):
    """list[dict]: ``name``, ``value``, ``bar`` and ``holds`` of each claim."""
    most = [
        (f"seconds to check {lines:,} lines, headers excluded", found["seconds"], SECONDS_BAR),
        (f"CPU seconds a processor to check {lines:,} lines", found["share"], SECONDS_BAR),
        (f"MB of all processes that check {lines:,} lines", found["memory"], MEMORY_BAR),
        (f"tokens of {COMPARED:,} lines differ from ConversationDataset's", found["tokens_apart"], 0),
    ]
    fewest = [
        ("ConversationDataset's CPU time of a line over the command's", found["peer"] / found["own"], SPEED_BAR),
        ("images whose headers are read in a CPU second", found["headers"], HEADERS_BAR),
    ]
    return [
        *({"name": name, "value": value, "bar": bar, "holds": value <= bar} for name, value, bar in most),
        *({"name": name, "value": value, "bar": bar, "holds": value >= bar} for name, value, bar in fewest),
    ]


if __name__ == "__main__":
    main()
