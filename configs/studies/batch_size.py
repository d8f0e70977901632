"""How large a batch the contrast needs, in the memory of a small one (gradient caching).

    python -m xclip_jax.study --study=configs/studies/batch_size.py --config=configs/msrvtt.py
    python -m xclip_jax.study --study=configs/studies/batch_size.py:75,150,300,600 --config=...

Without numbers: a quarter, a half, one and two of the config's batch. All see the same number of
pairs at the same learning rate, so a batch twice as large takes half the steps.
"""

from xclip_jax.study import Study, Variant


def get_study(config, sizes=""):
    """`sizes`: pairs a batch, with commas between them.

    The towers see the config's micro-batch at once, or the smallest of the sizes.
    """
    own = config.train.batch_size
    numbers = [int(size) for size in sizes.split(",") if size] or [own // 4, own // 2, own, 2 * own]
    at_once = config.train.micro_batch or min(numbers)
    return Study(
        title="Batch size, with gradient caching",
        columns=("pairs a batch",),
        variants={
            f"{size}": Variant({"train.batch_size": size, "train.micro_batch": at_once})
            for size in numbers
        },
        reference=f"{own}" if own in numbers else "",
        note=f"The towers see {at_once} pairs at once; all runs see the same number of pairs.",
    )
