"""How many frames a video needs.

    python -m xclip_jax.study --study=configs/studies/frames.py --config=configs/msrvtt.py
    python -m xclip_jax.study --study=configs/studies/frames.py:4,8,12,16 --config=...

Without numbers: 1, 2, 4, ... and the config's own.
"""

from xclip_jax.study import Study, Variant


def get_study(config, numbers=""):
    """`numbers`: of frames, with commas between them."""
    most = config.model.max_frames
    doubled = [2**power for power in range(10) if 2**power < most]
    frames = [int(number) for number in numbers.split(",") if number] or [*doubled, most]
    return Study(
        title="Number of frames",
        columns=("frames",),
        variants={f"{number}": Variant({"model.max_frames": number}) for number in frames},
    )
