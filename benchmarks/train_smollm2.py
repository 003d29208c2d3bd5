"""Train the adapter of recipes/smollm2: SmolLM2 on BBC news.

    python recipes/smollm2/fetch.py && python benchmarks/train_smollm2.py

LoRA of rank 2 on every linear layer, once over 600 training paragraphs in batches of 8, AdamW, learning rate
1e-3 falling linearly to zero; no choice was made on any split. About ten minutes on one core.
"""

import json
import random
import shutil
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parents[1] / "recipes" / "smollm2"
BASE, OUT = HERE / "cache" / "base", HERE / "news"
TEXTS, LENGTH, RANK, BATCH, RATE = 600, 128, 2, 8, 1e-3


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # on small batches, threads wait for one another
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    lines = (HERE / "cache" / "data" / "news-train.jsonl").read_bytes().splitlines()[:TEXTS]
    texts = [json.loads(line)["text"] for line in lines]
    start = [tokenizer.bos_token_id]  # the token that perplexity is measured after
    tokens = sorted(([*start, *tokenizer(text)["input_ids"]][:LENGTH] for text in texts), key=len)
    batches = [tokens[i : i + BATCH] for i in range(0, len(tokens), BATCH)]
    random.Random(0).shuffle(batches)

    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(batches))
    began = time.time()
    for step, batch in enumerate(batches):
        width = max(map(len, batch))
        ids = torch.tensor([one + [0] * (width - len(one)) for one in batch])
        labels = torch.tensor([one + [-100] * (width - len(one)) for one in batch])
        loss = model(input_ids=ids, labels=labels, attention_mask=(labels >= 0).long()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        falling.step()
        if step % 10 == 0:
            print(f"step {step} of {len(batches)}: loss {loss.item():.3f}, {time.time() - began:.0f} s", flush=True)

    shutil.rmtree(OUT, ignore_errors=True)
    model.save_pretrained(OUT)
    (OUT / "README.md").unlink(missing_ok=True)
    file = OUT / "adapter_model.safetensors"
    small = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(small, file, metadata={"format": "pt"})
    file.chmod(0o644)
    about = json.loads((OUT / "adapter_config.json").read_text())
    about["base_model_name_or_path"] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    (OUT / "adapter_config.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
