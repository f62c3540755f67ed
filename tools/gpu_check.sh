#!/usr/bin/env bash
# Everything that only a GPU can prove, in one go, on a machine that has Python, torch, Triton and transformers and
# can download nothing. Results go into a folder: kernels.txt, tuning.json, decode-*.json, overlap-*.json, summary.txt.
#
#   tools/gpu_check.sh [--out FOLDER] [--packages FOLDER] [--replays 1000] [--only check,tune,kernels,decode,overlap] [--kernels NAMES]
#   tools/gpu_check.sh --device cpu --tiny        the same steps on a CPU, on small shapes: does the script work?
#
# --packages: a folder made where there is a network, for what the machine lacks of requirements.txt:
#   pip install --target FOLDER -r requirements.txt --only-binary :all: --python-version 3.12 --no-deps
set -uo pipefail
cd "$(dirname "$0")/.."

out=gpu-check packages="" replays=1000 device=cuda tiny="" only=check,tune,kernels,decode,overlap kernels=""
while [ $# -gt 0 ]; do
  case $1 in
    --out) out=$2; shift ;;
    --packages) packages=$2; shift ;;
    --replays) replays=$2; shift ;;
    --only) only=$2; shift ;;
    --kernels) kernels=$2; shift ;;
    --device) device=$2; shift ;;
    --tiny) tiny=1 ;;
    *) echo "gpu_check: unknown option $1" >&2; exit 2 ;;
  esac
  shift
done
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${packages:+:$packages}${PYTHONPATH:+:$PYTHONPATH}"
[ "$device" = cuda ] || export CUDA_VISIBLE_DEVICES=
mkdir -p "$out"
failed=""

step() { # step NAME COMMAND...: its output goes to NAME.txt and here; a failure is remembered, the next step runs
  local name=$1; shift
  case ",$only," in *",${name%%-*},"*) ;; *) return ;; esac
  echo "== $name: $*"
  local start=$SECONDS
  "$@" 2>&1 | tee "$out/$name.txt"
  local status=${PIPESTATUS[0]}
  echo "$name: $([ "$status" = 0 ] && echo ok || echo "FAILED ($status)") in $((SECONDS - start)) s" >> "$out/summary.txt"
  [ "$status" = 0 ] || failed="$failed $name"
}

: > "$out/summary.txt"
"$python" - "$device" <<'PYTHON' | tee -a "$out/summary.txt" || exit 1
import importlib.util, platform, sys
wanted = ["torch", "numpy", "safetensors", "tokenizers", "gguf", "msgspec", "jinja2", "sentencepiece"]
wanted += ["triton"] if sys.argv[1] == "cuda" else []
missing = [name for name in wanted if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"gpu_check: missing here: {', '.join(missing)}; see --packages")
import torch
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("gpu_check: torch sees no GPU here (--device cpu --tiny tries the script itself)")
name = torch.cuda.get_device_name() if sys.argv[1] == "cuda" else platform.machine()
print(f"{name}, Python {platform.python_version()}, torch {torch.__version__}")
PYTHON
[ "${PIPESTATUS[0]}" = 0 ] || exit 1

sizes=production models="qwen3-0.6b qwen2.5-7b" batches=1,32,256 context=1024 tokens=128 seconds=0.2
dtype=bfloat16
if [ -n "$tiny" ]; then sizes=small models=tiny batches=1,4 context=16 tokens=8 seconds=0.01; fi

step check "$python" tools/bench_kernels.py $kernels --device "$device" --sizes small --replays "$replays" --check-only
if [ "$device" = cuda ]; then
  step tune "$python" tools/tune_kernels.py $kernels --out "$out/tuning.json"
fi
step kernels "$python" tools/bench_kernels.py $kernels --device "$device" --sizes "$sizes" --seconds "$seconds" \
  --plot "$out/roofline.png"
for model in $models; do
  folder="$out/models/$model"
  case ",$only," in *,decode,* | *,overlap,*) "$python" tools/random_model.py "$model" "$folder" || failed="$failed $model" ;; esac
  peer=(--vs transformers)
  "$python" -c "import transformers" 2> /dev/null || peer=()
  step "decode-$model" "$python" tools/bench_engine.py --model-path "$folder" --batch "$batches" \
    --context "$context" --tokens "$tokens" --rounds 3 --dtype "$dtype" \
    --set "max_concurrent=${batches##*,}" "${peer[@]}"
  step "overlap-$model" "$python" tools/bench_engine.py --model-path "$folder" --batch "$batches" \
    --context "$context" --tokens "$tokens" --rounds 3 --dtype "$dtype" \
    --set "max_concurrent=${batches##*,}" --set overlap=on --vs crane=overlap=off
  for kind in decode overlap; do
    [ -f "$out/$kind-$model.txt" ] && tail -1 "$out/$kind-$model.txt" > "$out/$kind-$model.json"
  done
  rm -rf "$folder"
done

cat "$out/summary.txt"
[ -z "$failed" ] || { echo "gpu_check: failed:$failed" >&2; exit 1; }
