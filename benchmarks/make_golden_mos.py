"""Make tests/golden/mos.safetensors with the MOS authors' own code.

    python benchmarks/make_golden_mos.py CHECKOUT [--out FILE] [--check]

CHECKOUT is a checkout of the authors' repository (sun-hailong/AAAI25-MOS on GitHub). Its backbone/vit_mos.py,
models/mos.py and utils/inc_net.py are imported and run as they are, on the CPU, with a stand-in for the three names
they take from timm; none of their code is in here. The model is the tiny one of tests/golden/mos_inputs.py. Dropout
is off, for its draws are torch's own. What is stored:

    frozen                     [ASKED, WIDTH]  features without an adapter
    features/TASK              [4, ASKED, WIDTH]  forward after forward under a stored adapter, each of all images
    shrunk/TASK                [4, RANK, WIDTH]  its first block's down.weight after each of those
    answers/BATCH/PASS         [ASKED]  _eval_cnn: the classes answered; passes in a row over one bank
    trained/...                _init_train of the second task: the adapter, and `weight`, `bias` of its head's rows
    mean, covariance           [2, WIDTH], [2, WIDTH, WIDTH]  _compute_mean after it
    left/...                   the adapter that the next task starts from

``--check`` compares a fresh run with the stored file instead of writing it.
"""

import argparse
import contextlib
import hashlib
import io
import json
import sys
import types
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "golden"))
import mos_inputs as gold

FILES = ("backbone/vit_mos.py", "models/mos.py", "utils/inc_net.py")


class PatchEmbed(nn.Module):
    """What the authors take from timm: a convolution, its places in a row."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


def stand_in_for_timm() -> None:
    for name in ("timm", "timm.models", "timm.models.layers", "timm.models.vision_transformer", "timm.models.registry"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["timm.models.layers"].DropPath = nn.Identity  # no path is dropped at the rate used
    sys.modules["timm.models.vision_transformer"].PatchEmbed = PatchEmbed
    sys.modules["timm.models.registry"].register_model = lambda model: model


def their_name(name: str) -> str:
    """transformers' name of a tensor in the authors' words."""
    for ours, theirs in (
        ("embeddings.cls_token", "cls_token"),
        ("embeddings.position_embeddings", "pos_embed"),
        ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
        ("layers.", "blocks."),
        ("attention.o_proj", "attn.proj"),
        ("attention.", "attn."),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        ("mlp.", ""),
        ("layernorm.", "norm."),
    ):
        name = name.replace(ours, theirs)
    return name


def put(modules: nn.ModuleList, adapter: dict[str, torch.Tensor]) -> None:
    """An adapter's values into the authors' module."""
    for block, module in zip(gold.BLOCKS, modules, strict=True):
        for part in gold.ADAPTER:
            layer, kind = part.split(".")
            getattr(getattr(module, f"{layer}_proj"), kind).data = adapter[f"{block}.{part}"].clone()


def taken(modules: nn.ModuleList) -> dict[str, torch.Tensor]:
    """The inverse of `put`."""
    out = {}
    for block, module in zip(gold.BLOCKS, modules, strict=True):
        for part in gold.ADAPTER:
            layer, kind = part.split(".")
            out[f"{block}.{part}"] = getattr(getattr(module, f"{layer}_proj"), kind).detach().clone()
    return out


class Reference:
    """The authors' model with the inputs in it, and their Learner around it."""

    def __init__(self, stored: int):
        """With the adapters of so many tasks stored."""
        from backbone import vit_mos

        config = types.SimpleNamespace(
            ffn_adapt=True, ffn_option="parallel", ffn_adapter_layernorm_option="none", ffn_adapter_init_option="lora",
            ffn_adapter_scalar=str(gold.SCALE), ffn_num=gold.RANK, d_model=gold.WIDTH, _device="cpu",
            adapter_momentum=gold.ALPHA, vpt_on=False, vpt_num=0,
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            self.vit = vit_mos.VisionTransformer(
                img_size=gold.IMAGE, patch_size=gold.PATCH, num_classes=2 * gold.TASKS, embed_dim=gold.WIDTH,
                depth=gold.DEPTH, num_heads=gold.HEADS, mlp_ratio=gold.MLP / gold.WIDTH, tuning_config=config,
            )  # fmt: skip
        weights = {their_name(name): tensor for name, tensor in gold.backbone().items()}
        missing, unexpected = self.vit.load_state_dict(weights, strict=False)
        if unexpected or any("adapter" not in name and "head" not in name for name in missing):
            sys.exit(f"the weights do not fit: {unexpected} {missing}")
        for name, parameter in self.vit.named_parameters():
            parameter.requires_grad_("head" in name or "adapter" in name)
        self.vit.head.weight.data, self.vit.head.bias.data = gold.head()
        for module in self.vit.cur_adapter:
            module.dropout = 0.0
        for task in range(stored):
            put(self.vit.cur_adapter, gold.adapter(task))
            self.vit.adapter_update()
        self.vit.eval()

    def learner(self, task: int):
        """Their Learner at a task, from 0."""
        from backbone.linears import CosineLinear
        from models.mos import Learner
        from utils.inc_net import MOSNet

        network = MOSNet.__new__(MOSNet)
        nn.Module.__init__(network)
        network.backbone, network.fc = self.vit, CosineLinear(gold.WIDTH, 2 * gold.TASKS)
        network.fc.weight.data = gold.prototypes()
        self.vit.out_dim = gold.WIDTH
        learner = Learner.__new__(Learner)
        learner._network, learner._device, learner.topk, learner.ensemble = network, "cpu", 1, True
        learner._cur_task, learner._known_classes, learner._total_classes = task, 2 * task, 2 * task + 2
        learner.cls2task = {number: number // 2 for number in range(2 * gold.TASKS)}
        learner.cls_mean, learner.cls_cov = dict(enumerate(gold.means())), {}
        learner.init_lr, learner.weight_decay, learner.min_lr = gold.LR, gold.WEIGHT_DECAY, 0.0
        learner.args = {
            "optimizer": "sgd", "scheduler": "cosine", "tuned_epoch": gold.EPOCHS, "adapter_momentum": gold.ALPHA,
            "reg": gold.ORTHOGONALITY, "ca_storage_efficient_method": "covariance",
        }  # fmt: skip
        return learner


def forwards() -> dict[str, torch.Tensor]:
    tensors, images = {}, gold.asked()
    vit = Reference(gold.TASKS).vit
    with torch.no_grad():
        tensors["frozen"] = vit(images, adapter_id=-1)["features"]
        for task in range(gold.TASKS):
            seen, shrunk = [], []
            for _ in range(4):
                seen.append(vit(images, adapter_id=task)["features"])
                shrunk.append(vit.adapter_list[task][0].down_proj.weight.detach().clone())
            tensors[f"features/{task}"], tensors[f"shrunk/{task}"] = torch.stack(seen), torch.stack(shrunk)
    mean = torch.stack([gold.adapter(task)["layers.0.down.weight"] for task in range(2)]).mean(0)
    private = gold.adapter(2)["layers.0.down.weight"] - mean
    for passes, left in enumerate(tensors["shrunk/2"], 1):
        share = ((left - mean).norm() / private.norm()).item()
        print(f"{passes} passes: {share:.7f} of the third adapter's own part left, .9^{12 * passes} = ", end="")
        print(f"{0.9 ** (12 * passes):.7f}")
    return tensors


def evaluations() -> dict[str, torch.Tensor]:
    tensors, images = {}, gold.asked()
    for batch, passes in gold.PASSES:
        learner = Reference(gold.TASKS).learner(gold.TASKS - 1)
        for number in range(passes):
            loader = [(None, part, torch.zeros(len(part), dtype=torch.int64)) for part in images.split(batch)]
            answers = torch.from_numpy(learner._eval_cnn(loader)[0][:, 0])
            tensors[f"answers/{batch}/{number}"] = answers
            print(f"batches of {batch}, pass {number + 1}: answers {answers.bincount(minlength=6).tolist()}")
    changed = (tensors["answers/16/0"] != tensors["answers/16/1"]).sum().item()
    print(f"changed by a second pass: {changed} of {gold.ASKED}")
    return tensors


def training() -> dict[str, torch.Tensor]:
    reference = Reference(1)
    vit, learner = reference.vit, reference.learner(1)
    put(vit.cur_adapter, gold.adapter(gold.TASKS))
    vit.head.weight.data[2:4], vit.head.bias.data[2:4] = gold.first_rows()
    images, labels = gold.learnt()
    optimizer = learner.get_optimizer(vit)
    learner._init_train([(None, images, labels + 2)], None, optimizer, learner.get_scheduler(optimizer))
    vit.adapter_update()
    tensors = {f"trained/{name}": tensor for name, tensor in taken(vit.adapter_list[1]).items()}
    tensors["trained/weight"] = vit.head.weight.detach()[2:4].clone()
    tensors["trained/bias"] = vit.head.bias.detach()[2:4].clone()
    learner.batch_size = gold.STATISTICS_BATCH // 3  # they take three times as many

    class Data:
        def get_dataset(self, classes, source, mode, ret_data):
            rows = images[labels == classes[0] - 2]
            return None, None, [(0, row, 0) for row in rows]

    learner.data_manager = Data()
    learner._compute_mean(vit)
    tensors["mean"] = torch.stack([learner.cls_mean[number] for number in (2, 3)])
    tensors["covariance"] = torch.stack([learner.cls_cov[number] for number in (2, 3)])
    return tensors | {f"left/{name}": tensor for name, tensor in taken(vit.cur_adapter).items()}


def build() -> dict[str, torch.Tensor]:
    return forwards() | evaluations() | training()


def check(tensors: dict[str, torch.Tensor]) -> None:
    stored, _ = gold.load()
    if stored.keys() != tensors.keys():
        sys.exit(f"names differ: {sorted(stored.keys() ^ tensors.keys())}")
    for key in sorted(stored):
        print(f"{key:40s} differs by at most {(stored[key].double() - tensors[key].double()).abs().max():.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--out", type=Path, default=gold.FILE)
    parser.add_argument("--check", action="store_true", help="compare with the stored file, write nothing")
    args = parser.parse_args()
    if not all((args.checkout / file).is_file() for file in FILES):
        parser.error(f"{args.checkout} is not a checkout of the authors' repository ({', '.join(FILES)})")
    stand_in_for_timm()
    sys.path.insert(0, str(args.checkout))
    torch.set_num_threads(1)
    tensors = {name: tensor.contiguous() for name, tensor in build().items()}
    if args.check:
        check(tensors)
        return
    from safetensors.torch import save_file

    about = {
        "reference": {file: hashlib.sha256((args.checkout / file).read_bytes()).hexdigest() for file in FILES},
        "inputs_sha256": gold.sha256(),
        "torch": torch.__version__.split("+")[0],
    }
    save_file(tensors, args.out, metadata={"about": json.dumps(about)})
    args.out.chmod(0o644)
    print(f"{args.out.name}: {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
