"""Studies: variants of a config, trained with several seeds, as one table with intervals.

A study is a file with a function get_study(config) that returns a Study; see configs/studies/.
"""

from xclip_jax.study.spec import Study, Variant

__all__ = ["Study", "Variant"]
