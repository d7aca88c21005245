"""Times tile shapes of the kernels on one GPU. `tune.py compile I` fills the cache with one shape, `tune.py time`
times all.

Run it as: seq 0 N | xargs -P 12 -I{} python benchmarks/tune.py compile {} ; python benchmarks/tune.py time
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import torch

from mgam.attend.triton.forward import Tiles, read
from mgam.attend.triton.lists import Lists
from mgam.attend.triton.prefill import WholeTiles
from mgam.attend.triton.tables import Turn
from mgam.benchmarks.machine import graphed, here, timed
from mgam.benchmarks.setting import Setting, blocks_of, built, in_blocks, states
from mgam.cover import Known, window_start
from mgam.policies.compact import CompactKeys
from mgam.policies.one_token_triton import Now
from mgam.policies.search_triton import SearchTiles, cover, most_entries, scores

TOKENS = 131072
READ = [WholeTiles(), WholeTiles(warps=4, registers=None), Tiles(128, 64, 8, 2, registers=128)]
TURNED = [WholeTiles(), WholeTiles(warps=4, registers=None), Tiles(128, 64, 8, 2, registers=128)]
SEARCH = [
    SearchTiles(128, 64, 4, 4), SearchTiles(64, 64, 4, 4), SearchTiles(64, 128, 4, 4), SearchTiles(64, 64, 4, 6),
    SearchTiles(64, 64, 4, 4, registers=168), SearchTiles(64, 64, 4, 4, registers=128),
]  # fmt: skip


DECODE = [
    Tiles(16, entries, warps, stages, splits)
    for entries, warps, stages in ((64, 4, 3), (64, 4, 2), (32, 2, 3), (128, 4, 2))
    for splits in (16, 32, 64)
]


def decoding(batch: int) -> list[tuple[str, Callable[[], object], float]]:
    """Reading for one token of `batch` rows of 32,768 tokens, by shape of tile; operations count each entry's bytes."""
    setting, tokens = Setting(), 32768
    queries, keys, values = states(setting, tokens, batch, 1)
    pyramid = built(setting, keys, values)
    lengths = torch.full((batch,), tokens, device="cuda")
    table = Now.of(lengths, setting.window, setting.levels, setting.kv_heads).write().table
    chosen = cover(torch.rand(batch, 8, tokens // 64, device="cuda"), table[3], setting.levels, 32)
    assert chosen.placed is not None
    index = (chosen.opened, *chosen.summaries)
    lists = Lists(setting.levels, table[:4], 1, index, *chosen.placed)
    turn = Turn.of(setting.placed, lists, tokens, queries.device)
    moved = 512.0 * 8 * float(chosen.entries().double().mean() + 512) * batch
    found: list[tuple[str, Callable[[], object], float]] = []
    for tiles in DECODE:

        def call(tiles: Tiles = tiles) -> object:
            return read(queries, lists, pyramid.keys, pyramid.values, 128**-0.5, turn=turn, tiles=tiles)

        found.append((f"decode, batch {batch}, {tiles}; rates are TB/s", call, moved * 1e6))
    return found


def jobs() -> list[tuple[str, Callable[[], object], float]]:
    """(name, call, operations) of every shape to try."""
    setting = Setting()
    queries, keys, values = states(setting, TOKENS)
    pyramid = built(setting, keys, values)
    blocks, cut = blocks_of(TOKENS, 128), in_blocks(queries, 128)
    start = window_start(blocks.decide, 512, setting.levels).cuda()
    begin = window_start(blocks.decide, 512, setting.levels)
    chosen = cover(torch.rand(len(blocks), 8, TOKENS // 64, device="cuda"), start, setting.levels, 32)
    chosen = replace(chosen, known=Known(begin, most_entries(TOKENS // 64, 32, setting.levels)))
    entries = sum(chosen.entries_per_level(blocks))
    flop = 4 * 128 * 32 * entries
    out = torch.empty_like(cut)
    found: list[tuple[str, Callable[[], object], float]] = []
    for kind, shapes in (("absolute", READ), ("granular", TURNED)):
        positions = replace(setting, positions=kind).placed
        lists = Lists.of(chosen, blocks, cut.device, positions)
        turn = Turn.of(positions, lists, TOKENS, cut.device)
        for tiles in shapes:

            def call(lists: Lists = lists, turn: Turn = turn, tiles: Tiles | WholeTiles = tiles) -> object:
                return read(cut, lists, pyramid.keys, pyramid.values, 128**-0.5, turn=turn, tiles=tiles, out=out)

            found.append((f"read {kind} {tiles}", call, flop))
    for name, each, widths in (("every 32", setting, 64), ("every 8", replace(setting, every=8), 64)):
        policy = each.policy
        assert policy.compact is not None
        votes = cut[-128:][:, :, (127 % policy.every) :: policy.every]
        live = torch.ones(votes.shape[0], votes.shape[2], dtype=torch.bool, device="cuda")
        last = blocks[-128:]
        short = CompactKeys.of(pyramid, pyramid.levels, policy.compact)
        asked = short.asked(votes, live, last.row.cuda(), (last.decide // 64).cuda(), 128**-0.5)
        flop = 2 * 128 * 32 * votes.shape[2] * float(last.decide.double().mean()) / 4 * widths
        for shape in SEARCH:

            def search(asked=asked, shape=shape):  # type: ignore[no-untyped-def]
                return scores(asked, TOKENS // 64, shape)

            found.append((f"search {name} {shape}, last 128 blocks", search, flop))
    return found + decoding(1) + decoding(16)


def main() -> None:
    todo = jobs()
    if sys.argv[1] == "compile":
        if int(sys.argv[2]) < len(todo):
            todo[int(sys.argv[2])][1]()
            torch.cuda.synchronize()
        return
    machine = here("tuning")
    print(machine, flush=True)
    for name, call, flop in todo:
        try:
            time = timed(graphed(call), seconds=0.1, least=3)
            rate = flop / time.median / 1e9
            print(f"{time.median:8.3f} ms {rate:7.1f} TFLOP/s {rate / machine.matmul:6.1%}  {name}", flush=True)
        except Exception as error:
            print(f"failed: {name}: {str(error)[:200]}", flush=True)


if __name__ == "__main__":
    main()
