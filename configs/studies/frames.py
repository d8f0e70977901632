"""Number of frames per video.

    python -m xclip_jax.study --study=configs/studies/frames.py --config=configs/msrvtt.py
    python -m xclip_jax.study --study=configs/studies/frames.py:4,8,12,16 --config=...

Default: the powers of two below the config's number, and that number.
"""

from xclip_jax.study import Study, Variant


def get_study(config, numbers=""):
    """Returns the study of `numbers`, comma-separated numbers of frames."""
    default = config.model.max_frames
    powers = [2**k for k in range(10) if 2**k < default]
    frames = [int(number) for number in numbers.split(",") if number] or [*powers, default]
    return Study(
        title="Number of frames",
        columns=("frames",),
        variants={f"{number}": Variant({"model.max_frames": number}) for number in frames},
    )
