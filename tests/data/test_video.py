"""Frames are those that the rule names, from every kind of file, and their number is known without decoding."""

import numpy as np
import pytest
from PIL import Image

from xtuner_ext.data import video
from xtuner_ext.data.video import FrameSampling, count_frames, read_frames
from xtuner_ext.errors import BadSample, UserError

from .malformed import number_shown, numbered, write_video

FRAMES, RATE = 50, 25
KINDS = {
    "mp4": {},
    "mkv": {},
    "avi": {},
    "webm": {"codec": "libvpx"},
    "ts": {"codec": "mpeg2video"},
    "flv": {"codec": "flv"},
    # A bare stream, without times or a length.
    "h264": {"codec": "libx264"},
    "gif": None,
    "folder": None,
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Function that gives a video whose frames show their numbers."""
    folder = tmp_path_factory.mktemp("videos")

    def make(kind, frames=FRAMES, **options):
        path = folder / f"{frames}{'_'.join(map(str, options.values()))}.{kind}"
        if path.exists():
            return path
        images = [Image.fromarray(numbered(number)) for number in range(frames)]
        if kind == "folder":
            path.mkdir()
            for number, image in enumerate(images):
                # Names that do not sort as their numbers do, with another number before.
                image.save(path / f"take2_frame{number}.png")
            (path / "notes.txt").write_text("no frame")
        elif kind == "gif":
            images[0].save(path, save_all=True, append_images=images[1:], duration=1000 // RATE)
        else:
            write_video(path, frames, RATE, **{**KINDS[kind], **options})
        return path

    return make


def numbers(path, sampling, clip=None, rng=None):
    """list[int]: Which frames were read."""
    return [number_shown(image) for image in read_frames(path, "d.jsonl:1", sampling, clip, rng)]


def settings(sampling, count=4, **more):
    return FrameSampling(more.pop("fewest", count), count, sampling, folder_fps=RATE, **more)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "sampling, count, clip, expected",
    [
        # Intervals of linspace(0, 50, 5): 0 12 25 37 50; their middles (a + b - 1) // 2.
        ("middle", 4, None, [5, 18, 30, 43]),
        ("middle", 1, None, [24]),
        # From frame 10 to before frame 30.
        ("middle", 5, (0.4, 1.2), [11, 15, 19, 23, 27]),
        # Centres of half seconds, 6.25 18.75 31.25 43.75.
        ("fps2", 32, None, [6, 19, 31, 44]),
        ("fps2", 3, None, [6, 19, 31]),
        ("fps0.1", 32, None, [25]),
        ("fps5", 32, (1, 2), [25 + 2, 25 + 8, 25 + 12, 25 + 18, 25 + 22]),
    ],
)
def test_frames_are_those_of_the_rule(videos, kind, sampling, count, clip, expected):
    path, sampling = videos(kind), settings(sampling, count)
    assert numbers(path, sampling, clip) == expected
    assert count_frames(path, "d.jsonl:1", sampling, clip) == len(expected)


@pytest.mark.parametrize("kind", ["mp4", "webm", "gif", "folder"])
def test_random_frames_are_one_of_each_part_and_follow_the_seed(videos, kind):
    path, found = videos(kind), []
    for seed in range(30):
        sampling = settings("rand", 8, fewest=4)
        chosen = numbers(path, sampling, rng=np.random.default_rng(seed))
        assert chosen == numbers(path, sampling, rng=np.random.default_rng(seed))
        assert len(chosen) == count_frames(path, "", sampling, rng=np.random.default_rng(seed))
        edges = np.linspace(0, FRAMES, len(chosen) + 1).astype(int)
        assert all(a <= frame < b for a, b, frame in zip(edges, edges[1:], chosen))
        found.append(chosen)
    assert {len(chosen) for chosen in found} == {4, 5, 6, 7, 8} and len({tuple(chosen) for chosen in found}) == 30
    # The last frame of a part too, which the exclusive end of InternVL's range leaves out.
    one = settings("rand", 1)
    assert {one.choose(3, 1, None, np.random.default_rng(seed))[0] for seed in range(40)} == {0, 1, 2}


@pytest.mark.parametrize("kind", ["mp4", "gif", "folder"])
@pytest.mark.parametrize("sampling", ["middle", "rand"])
def test_short_videos_show_their_last_frame_again(videos, kind, sampling):
    path = videos(kind, frames=3)
    assert numbers(path, settings(sampling, 6), rng=np.random.default_rng(0)) == [0, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("kind", ["mp4", "mkv", "avi", "ts", "h264"])
def test_far_frames_of_long_videos_are_looked_for(videos, kind, monkeypatch):
    """Which finds the same as decoding everything, and decodes little where there are key frames."""
    path = videos(kind, frames=500, gop=20)
    decoded = []
    decode = video._Container._decode
    monkeypatch.setattr(
        video._Container, "_decode", lambda self, number: (decoded.append(1) or one for one in decode(self, number))
    )
    sampling = settings("middle", 3)
    expected = sampling.choose(500, RATE)
    assert numbers(path, sampling) == expected == [82, 249, 416]
    assert len(decoded) < 200 or kind == "h264"
    monkeypatch.setattr(video, "SEEK_SECONDS", float("inf"))
    assert numbers(path, sampling) == expected


def test_frames_stand_upright():
    class Frame:
        rotation = 90

        @staticmethod
        def to_image():
            image = Image.new("RGB", (8, 4))
            image.putpixel((7, 0), (255, 0, 0))
            return image

    image = video._upright(Frame())
    assert image.size == (4, 8) and image.getpixel((0, 0)) == (255, 0, 0)


def test_decoding_nothing_counts_frames(videos, monkeypatch):
    monkeypatch.setattr(video._Container, "_decode", lambda *_: pytest.fail("decoded"))
    for kind in KINDS:
        assert count_frames(videos(kind), "", settings("middle", 7)) == 7


def test_a_video_that_ends_early_is_named(videos, tmp_path):
    avi = videos("avi", frames=500, gop=20).read_bytes()
    (tmp_path / "cut.avi").write_bytes(avi[: len(avi) // 2])
    message = "d.jsonl:1: .*cut.avi is not a readable video: it ends after .* of 20.00 seconds"
    with pytest.raises(BadSample, match=message):
        numbers(tmp_path / "cut.avi", settings("middle", 3))


@pytest.mark.parametrize("clip", [(2.0, 3.0), (0.0, 3.5), (7.0, 9.0)])
def test_clips_outside_a_video_are_named(videos, clip):
    with pytest.raises(BadSample, match="expected times within its 2.00 seconds") as caught:
        numbers(videos("mp4"), settings("middle"), clip)
    assert caught.value.reason == "format"


def test_clips_may_end_in_a_rounded_second(videos):
    assert numbers(videos("mp4"), settings("middle", 2), (1.0, 2.9)) == [30, 43]


def test_a_caption_names_every_frame():
    text = FrameSampling().caption("Look: <video>\nWhat?", 2)
    assert text == "Look: Frame-1: <image>\nFrame-2: <image>\nWhat?"
    assert FrameSampling(frame_prefix="Frame{i}: ").caption("<video>?", 2) == "Frame1: <image>\nFrame2: <image>?"
    assert FrameSampling(frame_prefix="").caption("<video>", 2) == "<image>\n<image>"


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(min_frames=0), "min_frames 0 to max_frames 32, expected 1 or more"),
        (dict(min_frames=9, max_frames=8), "min_frames 9 to max_frames 8"),
        (dict(sampling="random"), "sampling is 'random', expected rand, middle or fps and a number"),
        (dict(sampling="fps0"), "sampling is 'fps0'"),
        (dict(folder_fps=0), "folder_fps is 0, expected a number above 0"),
        (dict(frame_prefix="<image>"), "frame_prefix is '<image>'"),
        (dict(frames=3), "frames has unknown key 'frames', expected"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(UserError, match=message):
        FrameSampling.of(changes)


@pytest.mark.parametrize("sampling", ["middle", "rand", "fps1"])
@pytest.mark.parametrize("clip", [(10 / 3 - 1e-8, 4), (1, 1 + 1e-9)])
def test_the_shortest_clips_show_a_frame(clip, sampling):
    chosen = FrameSampling(4, 4, sampling).choose(10, 3, clip, np.random.default_rng(0))
    assert set(chosen) == {min(9, int(clip[0] * 3))}
