"""Small imitations of the five benchmarks: their file formats, irregular ids, tiny videos.

    python tests/standins.py msrvtt FOLDER

writes FOLDER/annotations and FOLDER/videos. Each has 12 training videos (the file of
one is missing), 6 test videos, and 4 validation videos where the benchmark has such a split.
"""

import json
import pickle
import sys
from fractions import Fraction
from pathlib import Path

import av

from xclip_jax.data import rendered

TRAIN, VAL, TEST = 12, 4, 6
CODECS = {".avi": "mpeg4", ".webm": "libvpx", ".wmv": "wmv2", ".mpg": "mpeg2video", ".3gp": "mpeg4"}


def write_video(path, scene):
    """Writes a video of the scene at two frames per second, as MP4 if the path has no suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    codec = CODECS.get(path.suffix, "libx264")
    options = {"libx264": {"crf": "12", "preset": "ultrafast"}}.get(codec, {"b": "800k"})
    rate = 25 if codec == "mpeg2video" else 2
    container_format = None if path.suffix else "mp4"
    with av.open(str(path), "w", format=container_format) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width = stream.height = rendered.SIDE
        stream.pix_fmt = "yuv420p"
        for number in range(rate * rendered.SECONDS):
            picture = rendered.render_frame(scene, number / rate)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _scenes():
    """Returns {split: scenes}, with other objects in val and test than in train."""
    counts = {"train": TRAIN, "val": VAL, "test": TEST}
    return {split: rendered.draw_scenes(split, count) for split, count in counts.items()}


def _write(folder, files):
    for name, content in files.items():
        path = folder / "annotations" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def _lines(items):
    return "".join(f"{item}\n" for item in items)


def msrvtt(folder):
    """Writes .mp4 and .webm videos, one without sentences, and one sentence for two videos."""
    scenes = _scenes()
    train, test = scenes["train"] + scenes["val"], scenes["test"]
    ids = {f"video{n}": scene for n, scene in enumerate(train + test)}
    names = list(ids)
    sentences = []
    for number, (name, scene) in enumerate(ids.items()):
        for caption in scene.captions if number != 3 else ():
            sentences.append({"video_id": name, "sen_id": len(sentences), "caption": caption})
        if number != 5:
            suffix = ".webm" if number % 4 == 1 else ".mp4"
            write_video(folder / "videos" / f"{name}{suffix}", scene)
    splits = ["train"] * TRAIN + ["validate"] * VAL + ["test"] * TEST
    videos = [
        {"video_id": name, "category": 1, "url": "", "start time": 1.5, "end time": 9.0}
        | {"split": split, "id": number}
        for number, (name, split) in enumerate(zip(names, splits, strict=True))
    ]
    tested = [(name, ids[name].captions[0]) for name in names[-TEST:]]
    tested[1] = (tested[1][0], tested[0][1])
    rows = [f'ret{n},msr{v[5:]},{v},"{s}"' for n, (v, s) in enumerate(tested)]
    _write(
        folder,
        {
            "MSRVTT_data.json": {"info": {}, "videos": videos, "sentences": sentences[::-1]},
            "MSRVTT_train.9k.csv": _lines(["video_id", *names[:-TEST]]),
            "MSRVTT_train.7k.csv": _lines(["video_id", *names[:TRAIN]]),
            "MSRVTT_JSFUSION_test.csv": _lines(["key,vid_key,video_id,sentence", *rows]),
        },
    )


def msvd(folder):
    """Writes .avi videos, ids that start with - or _, and a pickle with repeated captions."""
    captions, files = {}, {}
    for split, scenes in _scenes().items():
        ids = [f"{'-_a'[n % 3]}Qx{split}{n}_{n}_{n + 7}" for n in range(len(scenes))]
        files[f"{split}_list.txt"] = _lines(ids)
        for number, (name, scene) in enumerate(zip(ids, scenes, strict=True)):
            texts = [*scene.captions, scene.captions[0], "something moves"]
            captions[name] = [caption.split() for caption in texts]
            if (split, number) != ("train", 5):
                write_video(folder / "videos" / f"{name}.avi", scene)
    _write(folder, files)
    (folder / "annotations" / "raw-captions.pkl").write_bytes(pickle.dumps(captions, protocol=2))


def lsmdc(folder):
    """Writes one folder per film, ids with dots, and a clip with two sentences."""
    names = {"train": "annos_training", "val": "annos_val", "test": "challenge_1000_publictect"}
    files = {}
    for split, scenes in _scenes().items():
        lines = []
        for number, scene in enumerate(scenes):
            film = f"{1 + number % 2:04}_Example_{split}"
            clip = f"{film}_00.0{number % 10}.01.250-00.0{number % 10}.0{number // 10 + 4}.375"
            times = "00.00.01.250\t00.00.07.375\t00.00.00.750\t00.00.07.875"
            texts = scene.captions[: 2 if (split, number) == ("train", 2) else 1]
            lines += [f"{clip}\t{times}\tSOMEONE sees: {caption}. " for caption in texts]
            if (split, number) != ("train", 5):
                write_video(folder / "videos" / film / f"{clip}.avi", scene)
        files[f"LSMDC16_{names[split]}.csv"] = _lines(lines)
    _write(folder, files)


def didemo(folder):
    """Writes ids with suffixes .mp4, .mov (file x.mov.mp4) or a bare dot, some with two."""
    endings = (".mp4", ".mov", ".", ".avi")
    on_disk = {".mp4": ".mp4", ".mov": ".mov.mp4", ".": ".", ".avi": ".avi"}
    files = {}
    for split, scenes in _scenes().items():
        ids, items = [], []
        for number, scene in enumerate(scenes):
            stem = f"{100 + number}@N0{number % 9}_{split}{number}_a1b2.c3"
            ending = endings[number % 4]
            ids.append(stem + ending)
            sentences = [scene.captions[0] + "\n", "then it is over."]
            other = ".mp4" if number in (1, 2) else ending  # the same video by another suffix
            for part, (sentence, suffix) in enumerate(zip(sentences, (ending, other), strict=True)):
                times = [[0, part]] * (7 if number == 2 else 4)
                fields = {"annotation_id": len(items), "description": sentence, "dl_link": ""}
                items.append(fields | {"video": stem + suffix, "times": times, "num_segments": 6})
            if (split, number) != ("train", 5):
                write_video(folder / "videos" / (stem + on_disk[ending]), scene)
        files |= {f"{split}_list.txt": _lines(ids), f"{split}_data.json": items}
    _write(folder, files)


def activitynet(folder):
    """Writes id lists that differ from the captions, irregular spaces and a reversed segment."""
    scenes = _scenes()
    files = {}
    for split, several in (("train", scenes["train"]), ("val", scenes["test"])):
        videos = {}
        for number, scene in enumerate(several):
            name = f"v_-{split}_{number}Xy"
            sentences = [f"{scene.captions[0]}.", "  Nothing  else\n happens."]
            times = [[0, 3.0], [5.5, 6.01] if number else [4.0, 2.5]]
            videos[name] = {"duration": 6.0, "timestamps": times, "sentences": sentences}
            if (split, number) != ("train", 5):
                suffix = (".mp4", ".webm")[number % 2]
                write_video(folder / "videos" / f"part{number % 3}" / f"{name}{suffix}", scene)
        files[f"{split}_ids.json"] = [*videos, f"v_{split}_uncaptioned"]
        videos[f"v_{split}_in_no_list"] = videos[f"v_-{split}_0Xy"]
        files["train.json" if split == "train" else "val_1.json"] = videos
    files["val_2.json"] = files["val_1.json"]
    _write(folder, files)


STANDINS = {f.__name__: f for f in (msrvtt, msvd, lsmdc, didemo, activitynet)}

if __name__ == "__main__":
    STANDINS[sys.argv[1]](Path(sys.argv[2]))
