"""Inputs that are broken in one way each, and what must be said of them.

``write(folder, case)`` makes a dataset of one case: a broken meta file, or one whose line ``LINE`` is bad and
whose other lines are good.
"""

import dataclasses
import json
from pathlib import Path

import av
import numpy as np
from PIL import Image

# Number of the bad line; the line before it is blank.
LINE = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to be broken.

    Attributes:
        name (str): Short name.
        fragments (tuple[str]): What the message must contain, besides the file and, of a line, its number.
        reason (str | None): Of a bad line, one of ``xtuner_ext.data.ledger.REASONS``; None for a meta file.
        line (object): The bad line as an object, or as bytes.
        meta (object): The broken meta file as an object, or as bytes.
        late (bool): Whether the line can only be told to be bad when its files are read.
    """

    name: str
    fragments: tuple
    reason: str | None = None
    line: object = None
    meta: object = None
    late: bool = False


def turns(*texts):
    """list[dict]: Turns of human and gpt."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def asks(question="What?", answer="that", **fields):
    """dict: A line of one question."""
    return {**fields, "conversations": turns(question, answer)}


def _meta(**fields):
    return {"d": {"annotation": "d.jsonl", **fields}}


META_CASES = [
    Case("meta-not-json", ("meta.json", "is not valid JSON", "line 1 column"),
         meta=b'{"d": {"annotation": "d.jsonl"},}'),
    Case("meta-is-a-list", ("meta.json", "at least one dataset"), meta=[{"annotation": "d.jsonl"}]),
    Case("name-twice", ("'d' twice", "expected every name once"), meta=b'{"d": {"annotation": "d.jsonl"}, "d": {}}'),
    Case("unknown-key", ("dataset 'd'", "unknown key 'repeat_times'", "'repeat_time'"), meta=_meta(repeat_times=2)),
    Case("no-annotation", ("dataset 'd'", "has no key 'annotation'"), meta={"d": {"root": "."}}),
    Case("annotation-missing", ("annotation file", "gone.jsonl does not exist"),
         meta={"d": {"annotation": "gone.jsonl"}}),
    Case("annotation-is-a-folder", ("images is a folder, expected a JSONL file",),
         meta={"d": {"annotation": "images"}}),
    Case("path-null-byte", ("'d' has annotation", "expected a path"), meta={"d": {"annotation": "d\0.jsonl"}}),
    Case("annotation-empty", ("empty.jsonl is empty", "one JSON object a line"),
         meta={"d": {"annotation": "empty.jsonl"}}),
    Case("repeat-zero", ("'d' has repeat_time 0, expected a number above 0",), meta=_meta(repeat_time=0)),
    Case("repeat-negative", ("'d' has repeat_time -0.5, expected a number above 0",), meta=_meta(repeat_time=-0.5)),
    Case("repeat-true", ("'d' has repeat_time True, expected a number above 0",), meta=_meta(repeat_time=True)),
    Case("repeat-text", ("'d' has repeat_time '2', expected a number above 0",), meta=_meta(repeat_time="2")),
    Case("repeat-nan", ("'d' has repeat_time nan, expected a number above 0",), meta=_meta(repeat_time=float("nan"))),
    Case("tiles-zero", ("'d' has max_dynamic_patch 0, expected 1 tile or more",), meta=_meta(max_dynamic_patch=0)),
    Case("augment-text", ("'d' has data_augment 'true', expected true or false",), meta=_meta(data_augment="true")),
    Case("length-text", ("'d' has length '4', expected the number of lines",), meta=_meta(length="4")),
]
_NO_JSON = ("malformed JSON",)
_PICTURE = {"image": "images/good.png"}
_FILM = {"video": "videos/good.mp4"}
LINE_CASES = [
    Case("cut-off", (*_NO_JSON, "Unterminated string"), "json", b'{"conversations": [{"from": "human", "value": "Wh'),
    Case("trailing-comma", _NO_JSON, "json", json.dumps(asks()).encode()[:-1] + b",}"),
    Case("null-bytes", _NO_JSON, "json", b"\0" * 40),
    Case("null-byte-in-text", (*_NO_JSON, "control character"), "json",
         json.dumps(asks("a?b")).encode().replace(b"?", b"\0")),
    Case("latin-1", (*_NO_JSON, "'utf-8' codec"), "json", '{"text": "caf\xe9"}'.encode("latin-1")),
    Case("utf-16", _NO_JSON, "json", json.dumps(asks()).encode("utf-16-le")),
    Case("half-a-character", (*_NO_JSON, "surrogates not allowed"), "json", b'{"text": "\\ud83d"}'),
    Case("deeply-nested", (*_NO_JSON, "recursion"), "json", b"[" * 100_000),
    Case("bare-word", _NO_JSON, "json", b"conversations"),
    Case("array", ("is list, expected an object with a list 'conversations' or a 'text'",), "format", turns("q", "a")),
    Case("nan", ("is float, expected an object",), "format", b"NaN"),
    Case("neither", ("is an object with ['messages'], expected an object with",), "format",
         {"messages": turns("q", "a")}),
    Case("both", ("has both 'text' and 'conversations', expected one",), "format", {"text": "t", **asks()}),
    Case("text-is-a-list", ("'text' is list, expected a string",), "format", {"text": ["t"]}),
    Case("text-empty", ("'text' is empty",), "nothing_trained", {"text": " \n"}),
    Case("text-with-image", ("has images beside 'text', expected them with",), "format", {"text": "t", **_PICTURE}),
    Case("end-is-a-number", ("'end' is 1, expected true or false",), "format", asks(end=1)),
    Case("conversations-text", ("'conversations' is str, expected a list",), "conversation", {"conversations": "q"}),
    Case("conversations-empty", ("must alternate human and gpt", "found no turn"), "conversation",
         {"conversations": []}),
    Case("not-alternating", ("must alternate human and gpt", "found human human"), "conversation",
         {"conversations": [turns("q")[0], turns("r")[0]]}),
    Case("no-answer", ("end with gpt", "found human gpt human"), "conversation",
         {"conversations": turns("q", "a", "r")}),
    Case("wrong-role", ("conversations[1] is from 'bot', expected human or gpt",), "conversation",
         {"conversations": [turns("q")[0], {"from": "bot", "value": "a"}]}),
    Case("role-is-a-list", ("conversations[0] is from ['human'], expected human or gpt",), "conversation",
         {"conversations": [{"from": ["human"], "value": "q"}]}),
    Case("text-for-value", ("conversations[0] has no text 'value'", "['from', 'text']", "expected 'from' and 'value'"),
         "conversation", {"conversations": [{"from": "human", "text": "q"}]}),
    Case("value-null", ("conversations[0] has no text 'value'", "None"), "conversation",
         {"conversations": [{"from": "human", "value": None}]}),
    Case("answers-empty", ("every answer is empty, expected something to train",), "nothing_trained", asks(answer=" ")),
    Case("image-null", ("0 images but 1 <image> placeholders",), "placeholder", asks("<image>", image=None)),
    Case("image-list-null", ("'image' is [None], expected a path or a list of paths",), "format", asks(image=[None])),
    Case("image-number", ("'image' is 7, expected a path or a list of paths",), "format", asks(image=7)),
    Case("placeholder-surplus", ("1 images but 2 <image> placeholders",), "placeholder",
         asks("<image><image>", **_PICTURE)),
    Case("placeholder-missing", ("2 images but 1 <image> placeholders",), "placeholder",
         asks("<image>", image=["images/good.png"] * 2)),
    Case("placeholder-in-an-answer", ("conversations[1] has <image> outside a question",), "placeholder",
         asks("<image>", "<image>", **_PICTURE)),
    Case("image-missing", ("image", "images/gone.png does not exist"), "missing_file", asks(image="images/gone.png")),
    Case("image-null-byte", ("does not exist",), "missing_file", asks(image="images/\0.png")),
    Case("image-is-a-folder", ("images/folder.png is a folder, expected a file",), "unreadable_image",
         asks(image="images/folder.png")),
    Case("image-empty", ("images/empty.png is not a readable image",), "unreadable_image",
         asks(image="images/empty.png"), late=True),
    Case("image-is-text", ("images/text.png is not a readable image",), "unreadable_image",
         asks(image="images/text.png"), late=True),
    Case("image-cut-off", ("images/cut.jpg is not a readable image", "truncated"), "unreadable_image",
         asks(image="images/cut.jpg"), late=True),
    Case("one-of-several-cut-off", ("images/cut.png is not a readable image",), "unreadable_image",
         asks("<image><image>", image=["images/good.png", "images/cut.png"]), late=True),
    Case("video-number", ("'video' is 7, expected a path",), "format", asks(video=7)),
    Case("video-and-image", ("has both 'image' and 'video', expected one",), "format", asks(**_FILM, **_PICTURE)),
    Case("video-twice", ("1 videos but 2 <video> placeholders",), "placeholder", asks("<video><video>", **_FILM)),
    Case("video-with-image-placeholder", ("0 images but 1 <image> placeholders",), "placeholder",
         asks("<video><image>", **_FILM)),
    Case("no-video", ("0 videos but 1 <video> placeholders",), "placeholder", asks("<video>\nWhat?")),
    Case("clip-reversed", ("'clip' is [2, 1], expected [start, end] in seconds",), "format",
         asks(clip=[2, 1], **_FILM)),
    Case("clip-nan", ("'clip' is [0, nan], expected [start, end]",), "format", asks(clip=[0, float("nan")], **_FILM)),
    Case("clip-outside", ("videos/good.mp4", "'clip' is [5.0, 9.0], expected times within its 2.00 seconds"), "format",
         asks(clip=[5, 9], **_FILM), late=True),
    Case("video-missing", ("video", "videos/gone.mp4 does not exist"), "missing_file", asks(video="videos/gone.mp4")),
    Case("video-is-text", ("videos/text.mp4 is not a readable video",), "unreadable_video",
         asks(video="videos/text.mp4"), late=True),
    Case("video-cut-off", ("videos/cut.mp4 is not a readable video",), "unreadable_video",
         asks(video="videos/cut.mp4"), late=True),
    Case("sound-only", ("videos/sound.wav is not a readable video", "no video stream"), "unreadable_video",
         asks(video="videos/sound.wav"), late=True),
    Case("gif-is-text", ("videos/text.gif is not a readable video",), "unreadable_video",
         asks(video="videos/text.gif"), late=True),
    Case("no-frames", ("videos/empty is not a readable video", "holds no images"), "unreadable_video",
         asks(video="videos/empty"), late=True),
    Case("frame-broken", ("videos/broken is not a readable video",), "unreadable_video",
         asks(video="videos/broken"), late=True),
    Case("too-long", ("tokens, more than max_length=",), "too_long", asks("word " * 5000), late=True),
]
GOOD = [asks("one"), asks("two", **_PICTURE), {"text": "three"}, asks("four", **_FILM)]


def write(folder, case):
    """Write a dataset with one thing wrong.

    Args:
        folder (Path): New or empty folder.
        case (Case): What is wrong.

    Returns:
        tuple[Path, tuple[str], str | None]: The meta file, what the message must contain, and the reason.
    """
    folder = Path(folder)
    _write_files(folder)
    good = [json.dumps(line).encode() for line in GOOD]
    lines, fragments = good, case.fragments
    if case.meta is None:
        bad = case.line if isinstance(case.line, bytes) else json.dumps(case.line).encode()
        lines = [good[0], b" ", bad, *good[1:]]
        fragments = (f"d.jsonl:{LINE}: ", *fragments)
    (folder / "d.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    meta = _meta() if case.meta is None else case.meta
    (folder / "meta.json").write_bytes(meta if isinstance(meta, bytes) else json.dumps(meta).encode())
    return folder / "meta.json", fragments, case.reason


BITS, BAR = 10, 8


def numbered(number):
    """ndarray: A frame that shows its number in black and white bars, which survive lossy compression, (32, 80, 3)."""
    bits = [255 * (number >> bit & 1) for bit in range(BITS)]
    return np.tile(np.repeat(np.array(bits, np.uint8), BAR)[None, :, None], (32, 1, 3))


def number_shown(image):
    """int: The number in a frame."""
    bars = np.asarray(image).reshape(32, BITS, BAR, 3).mean(axis=(0, 2, 3)) > 127
    return sum(1 << bit for bit in range(BITS) if bars[bit])


def write_video(path, frames=50, rate=25, codec="mpeg4", gop=12):
    """Write a video whose frames show their numbers.

    Args:
        path (Path): File, whose suffix tells the container.
        frames (int): Number of frames.
        rate (int): Frames a second.
        codec (str): Name that FFmpeg gives it.
        gop (int): Frames from one key frame to the next.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = BITS * BAR, 32, "yuv420p"
        stream.codec_context.gop_size, stream.bit_rate = gop, 2_000_000
        for number in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(number), format="rgb24")))
        container.mux(stream.encode())


def _write_files(folder):
    images, videos = folder / "images", folder / "videos"
    for made in (images / "folder.png", videos / "empty", videos / "broken"):
        made.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("good.png", "cut.png", "cut.jpg"):
        Image.fromarray(noise).save(images / name)
    write_video(videos / "good.mp4")
    whole = (videos / "good.mp4").read_bytes()
    (videos / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    for path in (images / "cut.png", images / "cut.jpg"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for path in (images / "text.png", videos / "text.mp4", videos / "text.gif", videos / "broken" / "1.png"):
        path.write_text("no picture")
    (images / "empty.png").write_bytes(b"")
    (folder / "empty.jsonl").write_text("\n \n")
    with av.open(str(videos / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
