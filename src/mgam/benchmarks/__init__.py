"""Speed against peers, measured in one run, with the conditions beside every figure."""

PHASES = ("prefill", "decode", "training", "peers")
