"""Small films with sound for tests of clips: numbered frames, or a flash with a beep."""

from fractions import Fraction

import av
import numpy as np
import video_files

RATE = 48_000
FLASH = np.full((64, 96, 3), 235, np.uint8)
DARK = np.full((64, 96, 3), 16, np.uint8)


def write(path, pictures, beeps=(), *, rate=25, late=0, length=None, container=None, **options):
    """Writes a film with one picture every 1 / `rate` seconds, and beeps at (start, end).

    Picture and sound have the same clock. The first picture comes `late` seconds after the sound,
    which has `length` seconds. With `beeps` None there is no sound.
    """
    times = [late + Fraction(number) / rate for number in range(len(pictures))]
    return write_at(path, times, pictures, beeps, length=length, container=container, **options)


def write_at(
    path, times, pictures, beeps=(), *, length=None, container=None, setup=None, codec="libx264",
    sound="aac", origin=0, **options,
):  # fmt: skip
    """Writes a film with pictures at `times`, all time stamps `origin` seconds later."""
    base = {"preset": "ultrafast", "crf": "10", "g": "10"} if codec == "libx264" else {}
    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream(codec, rate=25, options=base | options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", video_files.MS
        if setup:
            setup(stream)
        if beeps is not None:
            audio = output.add_stream(sound, rate=RATE, layout="mono")
        packets = []
        for time, picture in zip(times, pictures, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round((time + origin) * 1000), video_files.MS
            packets += stream.encode(frame)
        packets += stream.encode(None)
        if beeps is not None:
            length = length or float(times[-1]) + 0.04
            packets += _encode_sound(audio, make_sound(beeps, length), origin)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            output.mux(packet)
    return path


def make_sound(beeps, length):
    times = np.arange(round(length * RATE)) / RATE
    sound = np.zeros_like(times, np.float32)
    for start, end in beeps:
        inside = (times >= start) & (times < end)
        sound[inside] = 0.8 * np.sin(2 * np.pi * 1000 * times[inside])
    return sound


def _encode_sound(stream, samples, origin):
    packets, chunk = [], 1024
    for start in range(0, len(samples), chunk):
        frame = av.AudioFrame.from_ndarray(samples[None, start : start + chunk], "fltp", "mono")
        frame.sample_rate, frame.pts = RATE, start + round(origin * RATE)
        frame.time_base = Fraction(1, RATE)
        packets += stream.encode(frame)
    return packets + stream.encode(None)


def flashing(seconds, flashes, rate=25):
    """Returns pictures that are white from a to b seconds for each (a, b)."""
    times = [number / rate for number in range(round(seconds * rate))]
    return [FLASH if any(a <= time < b for a, b in flashes) else DARK for time in times]


def numbered(count, height=64):
    """Returns pictures whose six columns, black or white, are the binary digits of their number."""
    digits = [[number >> place & 1 for place in range(6)] for number in range(count)]
    return [
        np.repeat(np.tile(235 * np.uint8(row), (height, 1)), 16, axis=1)[..., None].repeat(
            3, axis=2
        )
        for row in digits
    ]


def get_number(picture):
    """Returns the number of a picture of `numbered`, of any size."""
    columns = np.array_split(picture.mean(axis=(0, 2)), 6)
    return sum(1 << place for place, column in enumerate(columns) if column.mean() > 120)


def read_numbers(path):
    """Returns the numbers and the seconds of the frames of a film of numbered pictures."""
    with av.open(str(path)) as container:
        frames = [
            (get_number(frame.to_ndarray(format="rgb24")), frame.time)
            for frame in container.decode(video=0)
        ]
    return [number for number, _ in frames], [time for _, time in frames]


def read_onsets(path):
    """Returns the seconds at which the first flash and the first beep start, None without."""
    flash = beep = None
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            if frame.to_ndarray(format="rgb24").mean() > 120:
                flash = frame.time
                break
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return flash, None
        for frame in container.decode(audio=0):
            loud = np.flatnonzero(np.abs(frame.to_ndarray().astype(float)).max(axis=0) > 0.2)
            if len(loud):
                beep = frame.time + loud[0] / frame.sample_rate
                break
    return flash, beep


def read_packets(path, kind="video"):
    """Returns (time stamp in seconds, bytes) of each packet in the order of the file."""
    with av.open(str(path)) as container:
        stream = next(stream for stream in container.streams if stream.type == kind)
        return [
            (float(packet.pts * packet.time_base), bytes(packet))
            for packet in container.demux(stream)
            if packet.size
        ]
