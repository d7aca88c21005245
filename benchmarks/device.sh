#!/bin/bash
# Checks, tunes and times on one GPU: bash benchmarks/device.sh OUT COMMIT
out=$1; commit=$2
export PYTHONPATH=src PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2
nvidia-smi -L
t() { echo "== $1 at ${SECONDS}s"; }
t tests
timeout 130 python3 -m pytest -q -n 14 -p no:cacheprovider tests/test_triton_*.py > "$out/tests.log" 2>&1
grep -E "^E  |FAILED|passed|failed" "$out/tests.log" | cut -c1-170 | tail -40
t compile
seq 0 25 | timeout 80 xargs -P 13 -I{} python3 benchmarks/tune.py compile {} > "$out/compile.log" 2>&1
t tune
timeout 60 python3 benchmarks/tune.py time 2>&1 | tee "$out/tune.log" | cut -c1-200
t bench
timeout 110 python3 -c "import sys; from mgam.cli.bench import bench; from pathlib import Path; bench(lengths=\"8192,32768,131072\", phases=\"prefill,training,decode\", out=Path(sys.argv[1]), positions=\"granular\", budget=2048, window=512, heads=\"32,8\", dim=128, every=2, dims=64, bits=8, commit=sys.argv[2])" "$out" "$commit" 2>&1 | tee "$out/bench.log" | cut -c1-230
t end
