#!/usr/bin/env bash
# What can only be seen on a GPU, in ten minutes: tests/gpu (local backend), then tools/benchmark/gpu.py; one JSON file and one Markdown table.
#
#   tools/gpu_check.sh [--out DIR] [--python PYTHON] [--wheels DIR] [--seconds N] [--commit NAME]
#   tools/gpu_check.sh --fetch DIR             before, where there is a network: download the wheels for --wheels
#   tools/gpu_check.sh --device cpu --tiny     try this script without a GPU: the tests skip, the benchmark runs in toy sizes
#
# Needs Python 3.12 with torch, its torchvision, transformers and pytest, and no network. What else the tests need (13 MB: Megatron-Core,
# pydantic, pillow …) is carried along: --wheels DIR installs it into a temporary venv above the packages that are there. After
# make install-gpu give --python .venv/bin/python instead. A part that fails or takes too long does not keep the others from running; the
# exit code is then 1. DIR (default gpu-check) holds gpu_check.json, gpu_check.md and the logs.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=python3 out=gpu-check wheels= fetch= seconds=570 commit=() benchmark=()
# Wheels for --fetch; versions are those of requirements/gpu.txt.
carried=(megatron-core omegaconf antlr4-python3-runtime pydantic pydantic_core annotated-types typing-inspection pillow)
limit_mb=60

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }
die() { echo "error: $*" >&2; exit 2; }

while (($#)); do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --tiny) benchmark+=(--tiny); shift; continue ;;
        --out | --python | --wheels | --fetch | --seconds | --commit | --device) (($# > 1)) || die "$1 needs a value" ;;
        *) die "unknown option $1; see --help" ;;
    esac
    case $1 in
        --out) out=$2 ;;
        --python) python=$2 ;;
        --wheels) wheels=$2 ;;
        --fetch) fetch=$2 ;;
        --seconds) seconds=$2 ;;
        --commit) commit=(--commit "$2") ;;
        --device) benchmark+=(--device "$2") ;;
    esac
    shift 2
done
command -v "$python" >/dev/null || die "$python not found; name the interpreter that has torch by --python"

fetch_wheels() { # DIR
    local pins=() name pin platforms=() minor size
    for name in "${carried[@]}"; do
        pin=$(grep -E "^$name==" "$root/requirements/gpu.txt") || die "requirements/gpu.txt does not pin $name"
        pins+=("$pin")
    done
    for minor in $(seq 28 -1 17); do platforms+=(--platform "manylinux_2_${minor}_x86_64"); done
    mkdir -p "$1"
    "$python" -m pip --disable-pip-version-check download --quiet --no-deps --only-binary :all: --implementation cp --python-version 3.12 \
        "${platforms[@]}" --platform manylinux2014_x86_64 --dest "$1" "${pins[@]}" || return 1
    size=$(cat "$1"/*.whl | wc -c)
    echo "$(ls "$1"/*.whl | wc -l) wheels, $((size / 1000000)).$((size / 100000 % 10)) MB in $1"
    ((size < limit_mb * 1000000)) || { echo "error: over $limit_mb MB" >&2; return 1; }
}

if [[ $fetch ]]; then
    fetch_wheels "$fetch"
    exit
fi

mkdir -p "$out"
out=$(cd "$out" && pwd)
rm -f "$out"/{parts.tsv,tests.jsonl,benchmark.json,gpu_check.json,gpu_check.md} "$out"/*.log
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT

part() { # NAME SECONDS COMMAND…: bounded, logged, its exit code kept
    local name=$1 limit=$2 begin=$SECONDS code
    shift 2
    echo "== $name (at most $limit s)"
    timeout --signal=INT --kill-after=20 "$limit" "$@" 2>&1 | tee "$out/$name.log"
    code=${PIPESTATUS[0]}
    printf '%s\t%s\t%s\n' "$name" "$code" "$((SECONDS - begin))" >>"$out/parts.tsv"
    return "$code"
}

if [[ $wheels ]]; then
    compgen -G "$wheels/*.whl" >/dev/null || die "no wheels in $wheels; make them by --fetch"
    "$python" -m venv --without-pip --system-site-packages "$temporary/venv" || exit 1
    site=$("$temporary/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    # A venv made from a venv's Python sees the packages of the Python below both, not the parent's: add those, with their own .pth files.
    "$python" -c 'import sysconfig as s; print(*(f"import site; site.addsitedir({p!r})" for p in {s.get_path("purelib"), s.get_path("platlib")}), sep="\n")' \
        >"$site/parent.pth"
    part install 60 "$python" -m pip --disable-pip-version-check install --quiet --no-index --no-deps --target "$site" "$wheels"/*.whl
    python=$temporary/venv/bin/python
fi

cd "$root" || exit 1
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 GPU_CHECK_RESULTS=$out/tests.jsonl PYTHONUNBUFFERED=1
part tests $(((seconds - SECONDS) * 55 / 100)) "$python" tests/run.py tests/gpu -q
left=$((seconds - SECONDS - 15))
left=$((left > 5 ? left : 5)) # 0 would mean no limit
part benchmark "$left" "$python" -W ignore tools/benchmark/gpu.py --json "$out/benchmark.json" --seconds $((left * 9 / 10 - 10)) "${benchmark[@]}"
"$python" tools/gpu_report.py "$out" "${commit[@]}"
code=$?
echo "== $out/gpu_check.md"
exit "$code"
