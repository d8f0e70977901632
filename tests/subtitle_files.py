"""Small videos with subtitle streams."""

from fractions import Fraction

import av
import numpy as np

MS = Fraction(1, 1000)
HEADER = b"""[Script Info]
ScriptType: v4.00+

[V4+ Styles]
Format: Name, Fontname, Fontsize
Style: Default,Arial,16

[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
"""
_PREFIXES = {
    "mov_text": lambda text: len(text).to_bytes(2, "big") + text,
    "ass": lambda text: b"0,0,Default,,0,0,0,," + text,
}


def write_with_streams(path, streams, seconds=10, start=0.0):
    """Writes a video, whose first frame is at `start`, with [(codec, [(start, end, bytes)])]."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        video.codec_context.time_base = MS
        packets = []
        for codec, cues in streams:
            stream = container.add_stream(codec)
            stream.codec_context.subtitle_header = HEADER
            stream.codec_context.time_base = MS
            for begin, end, content in cues:
                packet = av.Packet(_PREFIXES.get(codec, bytes)(content))
                packet.stream, packet.time_base = stream, MS
                packet.pts = packet.dts = round(begin * 1000)
                packet.duration = round((end - begin) * 1000)
                packets.append(packet)
        for second in range(seconds):
            picture = np.full((64, 96, 3), 20 * second % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round((start + second) * 1000), MS
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        for packet in packets:
            container.mux(packet)
    return path
