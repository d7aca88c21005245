"""Tests of the nouns: levels, schedule, cover, pyramid, positions, merge, and the dispatcher."""
