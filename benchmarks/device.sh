#!/bin/bash
# Checks, tunes and times on one GPU: bash benchmarks/device.sh OUT COMMIT
out=$1; commit=$2
export PYTHONPATH=src PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2
t() { echo "== $1 at ${SECONDS}s"; }
bench() { python3 -c "import typer; from mgam.cli.bench import register; a = typer.Typer(); register(a); a()" \
    --out "$out" --commit "$commit" "$@" 2>&1 | tee -a "$out/bench.log" | cut -c1-230; }
nvidia-smi -L
t tests
timeout 90 python3 -m pytest -q -n 14 -p no:cacheprovider tests/test_triton_*.py > "$out/tests.log" 2>&1
grep -E "^E  |FAILED|passed|failed" "$out/tests.log" | cut -c1-170 | tail -30
t compile
seq 0 45 | timeout 60 xargs -P 13 -I{} python3 benchmarks/tune.py compile {} > "$out/compile.log" 2>&1
t tune
timeout 40 python3 benchmarks/tune.py time 2>&1 | tee "$out/tune.log" | cut -c1-170
t bench
export -f bench; export out commit
timeout 80 bash -c 'bench --name attention --lengths 8192,32768,131072,262144,1048576 --phases prefill,decode'
t training
timeout 45 bash -c 'bench --name training --lengths 8192,32768,131072 --phases training,peers'
t end
