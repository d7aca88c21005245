"""Quest: pages by the bound of their keys' coordinates, while generating."""

from mgam.methods.registry import Method, register
from mgam.policies.ranked import ByBound

register(
    Method(
        name="quest",
        title="Quest: pages by the bound of their keys; the prompt is read densely",
        policy=lambda s, scale: ByBound(s.budget, s.window, "drop", sink=False),
        paper="Tang et al. 2024, arXiv 2406.10774",
        phase="decode",
        cover="drops",
        mass=False,
        grows=1.0,
        positions=("absolute", "granular"),
        state="K and V of every token, smallest and largest coordinate per page",
        defaults=(
            ("levels", (1, 16)),
            ("budget", 1024),
            ("window", 1),
            ("positions", "absolute"),
            ("rest", "drop"),
            ("lookahead", "none"),
        ),
    )
)
