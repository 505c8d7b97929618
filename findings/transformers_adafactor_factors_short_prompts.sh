#!/usr/bin/env bash
# transformers 5.23.0 (torch 2.13.0) and optax 0.2.8 (jax 0.8.0): Adafactor on a prompt of 20 vectors, the same gradient.
# One would expect one rule under one name: prompt tuning was published with T5X's, which optax has, too.
# transformers factors the second moment of every matrix; T5X and optax only where both sides are 128 or longer.
# At a rate of 0.3 no entry moves more than 0.3 at optax's first step; at transformers' one moves many times as far.
# It hurts whoever takes a paper's rate along: losses jump in the first steps, and the prompt does not learn.
# Our product keeps the second moment whole where a side is below 128, as the paper did.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0
venv/bin/pip install -q transformers==5.23.0 optax==0.2.8 jax==0.8.0 jaxlib==0.8.0

HF_HUB_OFFLINE=1 timeout 120 venv/bin/python - <<'EOF'
import sys

import jax.numpy as jnp
import numpy as np
import optax
import torch
from transformers.optimization import Adafactor

rng = np.random.default_rng(0)
# A gradient as a prompt has: some of its vectors and some of its directions matter far more than others.
gradient = rng.normal(size=(20, 512)) * np.exp(rng.normal(size=(20, 1))) * np.exp(2 * rng.normal(size=(20, 512)))
gradient = gradient.astype(np.float32)

prompt = torch.nn.Parameter(torch.zeros(20, 512))
prompt.grad = torch.from_numpy(gradient.copy())
options = {"decay_rate": -0.8, "scale_parameter": False, "relative_step": False, "warmup_init": False}
Adafactor([prompt], lr=0.3, **options).step()
of_transformers = float(prompt.detach().abs().max())

rule = optax.adafactor(
    0.3, min_dim_size_to_factor=128, decay_rate=0.8, multiply_by_parameter_scale=False, momentum=None
)
zero = jnp.zeros((20, 512))
update, _ = rule.update(jnp.asarray(gradient), rule.init(zero), zero)
of_optax = float(jnp.abs(update).max())

print(f"largest entry of the first step at a rate of 0.3: transformers {of_transformers:.3f}, optax {of_optax:.3f}")
if of_optax > 0.301:
    sys.exit("Changed: optax's first step is larger than its rate.")
if of_transformers < 3 * of_optax:
    sys.exit("Changed: transformers' first step is no larger than optax's.")
EOF
