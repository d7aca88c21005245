"""The four patterns of the Comprehensive Attention Benchmark as small tasks that train in minutes.

Zhang et al. 2023, "CAB: Comprehensive Attention Benchmarking on Long Sequence Modeling" (arXiv 2210.07661): attention
is noncausal or causal, self or cross, and the order of methods differs from pattern to pattern. The benchmark's own
tasks need days and data sets; these need neither, each can only be solved by attending, and each has one right answer.
"""

from mgam.evaluation.patterns.efficiency import efficiency_length
from mgam.evaluation.patterns.leaks import first_leak
from mgam.evaluation.patterns.tasks import PATTERNS, Batch, Pattern, make_batch

__all__ = ["PATTERNS", "Batch", "Pattern", "efficiency_length", "first_leak", "make_batch"]
