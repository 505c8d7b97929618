#!/usr/bin/env bash
# peft 0.21.2 (with transformers 5.23.0, torch 2.13.0), prompt tuning of a decoder on a batch that is padded on the left.
# One would expect a masked padding token to change nothing, as it does in the model itself, where generate pads so.
# PEFT puts the padding between the prompt and the text, and drops position_ids: all words get other positions.
# It hurts whoever generates in batches, for which transformers asks for left padding: answers differ by the batch.
# Our export's README.md says so and pads on the right; a row behind a prompt is never padded in our own service.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
timeout 600 venv/bin/pip install -q torch==2.13.0
timeout 600 venv/bin/pip install -q transformers==5.23.0 peft==0.21.2

HF_HUB_OFFLINE=1 timeout 120 venv/bin/python - <<'EOF'
import sys
import warnings

import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

warnings.simplefilter("ignore")  # PEFT warns that it drops position_ids
torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=50, initializer_range=0.3, **sizes)).eval()
text = torch.tensor([[20, 21, 22, 23]])


def apart(of):
    """How far the logits of the text's last token move with one masked padding token on each side."""
    with torch.no_grad():
        alone = of(input_ids=text, attention_mask=torch.ones_like(text)).logits[0, -1]
        moved = []
        for left, right in ((1, 0), (0, 1)):
            ids = torch.nn.functional.pad(text, (left, right))
            mask = torch.nn.functional.pad(torch.ones_like(text), (left, right))
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            logits = of(input_ids=ids, attention_mask=mask, position_ids=positions).logits[0]
            moved.append(float((logits[-1 - right] - alone).abs().max()))
    return moved


plain = apart(model)
tuned = apart(get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval())
for name, (left, right) in (("the model itself", plain), ("through PEFT", tuned)):
    print(f"{name}: logits move by {left:.6f} with padding on the left, by {right:.6f} with padding on the right")
if tuned[0] < 1e-3:
    sys.exit("Changed: PEFT answers alike behind left padding.")
if max(*plain, tuned[1]) > 1e-4:
    sys.exit("Changed: padding on the right, or in the model itself, moves logits too.")
EOF
