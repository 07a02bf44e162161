"""The models against published counts, RobustBench's names, other implementations and plain re-statements."""

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from models import MODELS, create_model
from models.weights import load_weights, statistics_of

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
UNIT = (0, 0, 0), (1, 1, 1)
SMALL = ["wrn-10-1", "wrn-10-1-swish", "wrn-16-2", "wrn-16-2-swish", "wrn-10-3-swish"]
KINDS = ["wrn-10-1", "wrn-10-2-swish", "preact-resnet18", "preact-resnet18-swish", "resnet18"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randomized(name, num_classes=10, dtype=torch.float64, **kwargs):
    """A model in eval mode whose every weight and running statistic is random, so that none passes for another."""
    model = create_model(name, num_classes, **kwargs).to(dtype).eval()
    with torch.no_grad():
        for entry, value in model.state_dict().items():
            if entry.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif value.dim() == 1:
                value.uniform_(0.5, 1.5).mul_(torch.randint_like(value, 2) * 2 - 1)
            elif value.dim() > 1:
                value.normal_(0, math.sqrt(2 / value[0].numel()))
    return model


def count(name, num_classes=10):
    with torch.device("meta"):
        return sum(p.numel() for p in create_model(name, num_classes).parameters())


# ---- what the models are


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("wrn-28-10", 36_479_194),
        ("wrn-28-10-swish", 36_479_194),
        ("wrn-34-10", 46_160_474),
        ("wrn-40-2", 2_243_546),
        ("wrn-16-4", 2_748_890),
        ("preact-resnet18", 11_172_170),
        ("preact-resnet18-swish", 12_548_426),  # counted on RobustBench's DMPreActResNet
        ("resnet18", 11_173_962),
        ("resnet34", 21_282_122),
        ("resnet50", 23_520_842),
        ("resnet101", 42_512_970),
    ],
)
def test_parameter_count_is_the_published_one(name, published):
    assert count(name) == published


@pytest.mark.parametrize(
    ("depth", "width", "classes"), [(10, 1, 10), (10, 2, 10), (16, 1, 200), (22, 3, 10), (70, 16, 100)]
)
def test_wide_resnet_parameter_count_in_closed_form(depth, width, classes):
    k = (depth - 4) // 6
    total = 27 * 16
    for a, b in [(16, 16 * width), (16 * width, 32 * width), (32 * width, 64 * width)]:
        convolutions = 9 * a * b + (2 * k - 1) * 9 * b * b + (a * b if a != b else 0)
        total += convolutions + 2 * a + (2 * k - 1) * 2 * b
    total += 2 * 64 * width + (64 * width + 1) * classes
    assert count(f"wrn-{depth}-{width}", classes) == total


@pytest.mark.parametrize(
    ("depth", "stages"),
    [(18, (64, 128, 256, 512)), (34, (64, 128, 256, 512)), (50, (256, 512, 1024, 2048)), (101, (256, 512, 1024, 2048))],
)
def test_preact_resnet_has_what_the_resnet_has_but_batch_norm_on_the_shortcuts(depth, stages):
    on_shortcuts = stages[1:] if depth < 50 else stages
    assert count(f"resnet{depth}") - count(f"preact-resnet{depth}") == 2 * sum(on_shortcuts)


def wide_resnet_names(blocks, shortcut_in_first):
    """As RobustBench 1.1.1 has them in DMWideResNet.state_dict(), in order."""

    def norm(prefix):
        return [f"{prefix}.{e}" for e in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]

    names = ["init_conv.weight"]
    for group in range(3):
        for i in range(blocks):
            block = f"layer.{group}.block.{i}"
            names += [*norm(f"{block}.batchnorm_0"), f"{block}.conv_0.weight"]
            names += [*norm(f"{block}.batchnorm_1"), f"{block}.conv_1.weight"]
            if i == 0 and (group > 0 or shortcut_in_first):
                names.append(f"{block}.shortcut.weight")
    return [*names, *norm("batchnorm"), "logits.weight", "logits.bias"]


@pytest.mark.parametrize("suffix", ["", "-swish"])
@pytest.mark.parametrize(("depth", "width"), [(10, 1), (10, 2), (16, 1), (16, 2)])
def test_wide_resnet_names_are_robustbenchs(depth, width, suffix):
    names = list(create_model(f"wrn-{depth}-{width}{suffix}").state_dict())
    assert names == wide_resnet_names((depth - 4) // 6, shortcut_in_first=width > 1)


def test_preact_resnet_names_are_those_of_the_field():
    rice = set(create_model("preact-resnet18").state_dict())
    assert {"conv1.weight", "layer1.0.bn1.weight", "layer2.0.shortcut.0.weight", "layer4.1.conv2.weight"} < rice
    assert {"bn.running_var", "linear.bias"} < rice
    deepmind = set(create_model("preact-resnet18-swish").state_dict())
    assert {"conv_2d.weight", "layer_0.0.batchnorm_0.weight", "layer_3.1.conv_2d_2.weight", "logits.bias"} < deepmind
    assert {"layer_1.0.shortcut.weight", "batchnorm.running_var"} < deepmind


# ---- what they compute


def batch_norm(state, name, x):
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)


def same_padding(x, stride):
    return F.pad(x, (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1))


def swish(x):
    return x / (1 + torch.exp(-x))


def wide_resnet(state, x, blocks, activation):
    """DeepMind's forward pass on the raw tensors."""
    x = F.conv2d(x, state["init_conv.weight"], padding=1)
    for group in range(3):
        for i in range(blocks):
            b = f"layer.{group}.block.{i}"
            stride = 2 if group > 0 and i == 0 else 1
            active = activation(batch_norm(state, f"{b}.batchnorm_0", x))
            out = F.conv2d(same_padding(active, stride), state[f"{b}.conv_0.weight"], stride=stride)
            out = activation(batch_norm(state, f"{b}.batchnorm_1", out))
            out = F.conv2d(out, state[f"{b}.conv_1.weight"], padding=1)
            if state[f"{b}.conv_0.weight"].shape[0] != state[f"{b}.conv_0.weight"].shape[1]:
                x = F.conv2d(active, state[f"{b}.shortcut.weight"], stride=stride)
            x = x + out
    x = activation(batch_norm(state, "batchnorm", x))
    return F.linear(x.mean(dim=(2, 3)), state["logits.weight"], state["logits.bias"])


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_wide_resnet_is_the_plain_forward_pass(name, size):
    model = randomized(name, mean=MEAN, std=STD)
    x = torch.rand(3, 3, size, size, dtype=torch.float64)
    seen = x
    if name.endswith("-swish"):
        seen = (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    blocks = (int(name.split("-")[1]) - 4) // 6
    expected = wide_resnet(model.state_dict(), seen, blocks, swish if name.endswith("-swish") else F.relu)
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
    assert expected.std(dim=0).min() > 1e-3


def preact_resnet(state, x, deepmind):
    """Basic or bottleneck blocks, Rice et al.'s or DeepMind's, on the raw tensors."""
    activation, norm, conv = (swish, "batchnorm_", "conv_2d_") if deepmind else (F.relu, "bn", "conv")
    x = F.conv2d(x, state["conv_2d.weight" if deepmind else "conv1.weight"], padding=1)
    for stage in range(4):
        i = 0
        while f"{(b := f'layer_{stage}.{i}' if deepmind else f'layer{stage + 1}.{i}')}.{conv}1.weight" in state:
            stride = 2 if stage > 0 and i == 0 else 1
            convolutions = sum(f"{b}.{conv}{j}.weight" in state for j in (1, 2, 3))
            strided = 2 if convolutions == 3 else 1
            out = x
            for j in range(1, convolutions + 1):
                weight = state[f"{b}.{conv}{j}.weight"]
                out = active = activation(batch_norm(state, f"{b}.{norm}{j - 1 if deepmind else j}", out))
                if j == 1:
                    first = active
                s = stride if j == strided else 1
                padded = same_padding(out, s) if deepmind else F.pad(out, (weight.shape[-1] // 2,) * 4)
                out = F.conv2d(padded, weight, stride=s)
            if f"{b}.shortcut.weight" in state:
                x = F.conv2d(same_padding(x, stride), state[f"{b}.shortcut.weight"], stride=stride)
            elif f"{b}.shortcut.0.weight" in state:
                x = F.conv2d(first, state[f"{b}.shortcut.0.weight"], stride=stride)
            x = x + out
            i += 1
    x = activation(batch_norm(state, "batchnorm" if deepmind else "bn", x)).mean(dim=(2, 3))
    last = "logits" if deepmind else "linear"
    return F.linear(x, state[f"{last}.weight"], state[f"{last}.bias"])


@pytest.mark.parametrize("name", ["preact-resnet18", "preact-resnet50", "preact-resnet18-swish"])
@torch.no_grad()
def test_preact_resnet_is_the_plain_forward_pass(name):
    model = randomized(name, mean=(0, 0, 0), std=(1, 1, 1))
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    expected = preact_resnet(model.state_dict(), x, deepmind=name.endswith("-swish"))
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("depth", [18, 50])
@torch.no_grad()
def test_resnet_is_torchvisions_with_a_small_stem(depth):
    other = getattr(torchvision.models, f"resnet{depth}")(num_classes=10)
    other.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    other.maxpool = nn.Identity()
    other.double().eval()
    model = randomized(f"resnet{depth}")
    state = {n.replace("shortcut", "downsample").replace("linear", "fc"): v for n, v in model.state_dict().items()}
    other.load_state_dict(state)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(model(x), other(x))


@pytest.mark.parametrize("name", ["preact-resnet18", "preact-resnet34-swish", "resnet18", "wrn-10-1"])
def test_64x64_images_and_200_classes(name):
    assert create_model(name, 200).eval()(torch.rand(2, 3, 64, 64)).shape == (2, 200)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_each_depth_has_its_number_of_layers(name):
    depth = int("".join(c for c in name if c.isdigit()))
    with torch.device("meta"):
        model = create_model(name)
    main = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "shortcut" not in n]
    assert len(main) == depth


@pytest.mark.parametrize("name", ["wrn-10-1", "preact-resnet18", "resnet18"])
@torch.no_grad()
def test_normalizing_inside_is_normalizing_outside(name):
    inside = randomized(name, mean=MEAN, std=STD, normalize=True)
    outside = create_model(name, mean=MEAN, std=STD).double().eval()
    outside.load_state_dict(inside.state_dict(), strict=True)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    normalized = (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    torch.testing.assert_close(inside(x), outside(normalized))
    assert not torch.allclose(inside(x), outside(x))


@pytest.mark.parametrize("name", ["wrn-10-1-swish", "preact-resnet18-swish"])
def test_swish_models_normalize_unless_told_otherwise_by_default_with_cifar10s_statistics(name):
    implicit = randomized(name)
    plain, identity = (
        create_model(name, mean=m, std=s, normalize=n) for m, s, n in ((MEAN, STD, False), (*UNIT, True))
    )
    plain.load_state_dict(identity.state_dict(), strict=True)
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(plain.eval()(x), identity.eval()(x))
    explicit = create_model(name, mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616)).double().eval()
    explicit.load_state_dict(implicit.state_dict(), strict=True)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(implicit(x), explicit(x), rtol=0, atol=0)


def test_mean_and_std_are_no_entries_but_follow_the_model():
    model = create_model("wrn-10-1", mean=MEAN, std=STD, normalize=True)
    assert list(model.state_dict()) == wide_resnet_names(1, shortcut_in_first=False)
    assert not [n for n, _ in model.named_parameters() if "mean" in n or "std" in n]
    assert {b.dtype for n, b in model.double().named_buffers() if n.endswith((".mean", ".std"))} == {torch.float64}


def test_batch_norm_momentum():
    for name, momentum in [("wrn-10-2-swish", 0.01), ("wrn-10-1", 0.01), ("preact-resnet18", 0.1), ("resnet18", 0.1)]:
        layers = [m for m in create_model(name).modules() if isinstance(m, nn.BatchNorm2d)]
        assert layers and {m.momentum for m in layers} == {momentum}, name


def test_initialization_is_pytorchs():
    for name in ("wrn-10-4-swish", "preact-resnet18", "resnet18"):
        for module in create_model(name).modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                bound = 1 / math.sqrt(module.weight[0].numel())
                weight = module.weight.detach()
                assert 0.9 * bound < weight.abs().max() <= bound
                assert (weight**2).mean() == pytest.approx(bound**2 / 3, rel=0.2)


# ---- GroupNorm


@pytest.mark.parametrize("name", [*KINDS, "wrn-28-10", "preact-resnet50"])
def test_group_norm_replaces_every_batch_norm(name):
    with torch.device("meta"):
        before, after = create_model(name), create_model(name, group_norm=True)
    replaced = {n: m for n, m in before.named_modules() if isinstance(m, nn.BatchNorm2d)}
    groups = {n: m for n, m in after.named_modules() if isinstance(m, nn.GroupNorm)}
    assert not [m for m in after.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert list(groups) == list(replaced)
    for layer, module in groups.items():
        channels = replaced[layer].num_features
        assert (module.num_groups, module.num_channels, module.affine) == (min(32, channels), channels, True)


def test_group_norm_where_32_does_not_divide_the_channels():
    model = create_model("wrn-10-3", group_norm=True).eval()
    groups = {m.num_channels: m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm)}
    assert groups == {16: 16, 48: 24, 96: 32, 192: 32}
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


# ---- kinds of input


@pytest.mark.parametrize("group_norm", [False, True])
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_layout_of_the_input_does_not_matter(name, group_norm):
    model = randomized(name, group_norm=group_norm)
    x = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    expected = model(x)
    kept = x.clone()
    wide = torch.rand(3, 3, 8, 16, dtype=torch.float64)
    wide[..., ::2] = x
    for other in (x.contiguous(memory_format=torch.channels_last), wide[..., ::2]):
        torch.testing.assert_close(model(other), expected)
    torch.testing.assert_close(model(x[:1]), expected[:1])
    assert torch.equal(x, kept)
    torch.testing.assert_close(model.to(memory_format=torch.channels_last)(x), expected)
    torch.testing.assert_close(model.float()(x.float()).double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["wrn-10-1", "wrn-10-2-swish", "preact-resnet18"])
def test_forward_mode_derivative_in_weights_and_input(name):
    model = randomized(name, 3)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    weights = {n: p.detach() for n, p in model.named_parameters()}
    direction = {n: torch.randn_like(p) for n, p in weights.items()}
    move = torch.randn_like(x)

    def logits(weights, x):
        return torch.func.functional_call(model, weights, (x,))

    _, slope = torch.func.jvp(logits, (weights, x), (direction, move))
    h = 1e-7
    ends = [logits({n: p + s * h * direction[n] for n, p in weights.items()}, x + s * h * move) for s in (1, -1)]
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / (2 * h), rtol=1e-4, atol=1e-4)


# ---- names and arguments


@pytest.mark.parametrize(
    "name",
    [
        "wrn-12-1",
        "wrn-4-1",
        "wrn-10-0",
        "wrn-28",
        "wrn-28-10-relu",
        "wrn-28-10-swish-swish",
        "WRN-28-10",
        "wrn--10-1",
        "",
    ]
    + [
        "wrn-1000000000-1",
        "wrn-10-10\n",
        "resnet19",
        "resnet18-swish",
        "preact-resnet50-swish",
        "preact_resnet18",
        "vgg",
    ],
)
def test_unknown_names_are_refused_with_those_accepted(name):
    with pytest.raises(ValueError) as error:
        create_model(name)
    message = str(error.value)
    assert repr(name) in message and "wrn-D-W" in message and "preact-resnet101" in message and "\n" not in message


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"num_classes": 1}, "num_classes 1"),
        ({"mean": (0.5, 0.5), "std": STD}, r"mean \[0.5, 0.5\]"),
        ({"mean": (0.5, 0.5, math.nan), "std": STD}, "nan"),
        ({"mean": MEAN, "std": (0.2, 0.0, 0.2)}, r"std \[0.2, 0.0, 0.2\]"),
    ],
)
def test_bad_arguments_are_refused(kwargs, named):
    with pytest.raises(ValueError, match=named):
        create_model("wrn-10-1-swish", **kwargs)


# ---- weights of others


def saved(name="wrn-10-1-swish", num_classes=10, **kwargs):
    return randomized(name, num_classes, torch.float32, **kwargs).state_dict()


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "module.",
        "0.",
        "module.0.",
        "0.module.",
        "module.module.",
        "_orig_mod.",
        "module._orig_mod.",
        "model.",
        "module.model.",
        "module.1.",
        "1.",
        "0.1.",
    ],
)
def test_load_weights_takes_prefixes_off(prefix):
    state = saved()
    model = create_model("wrn-10-1-swish")
    load_weights(model, prefixed(state, prefix), "file.pt")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("where", ["", "0.", "module.", "module.0."])
def test_load_weights_leaves_out_mean_and_std(where):
    state = saved()
    model = create_model("wrn-10-1-swish")
    weights = prefixed(state, {"0.": "1.", "module.0.": "module.1."}.get(where, where))
    weights[f"{where}mean"] = torch.tensor((0.4914, 0.4822, 0.4465)).view(1, 3, 1, 1)
    weights[f"{where}std"] = torch.tensor((0.2471, 0.2435, 0.2616)).view(1, 3, 1, 1)
    load_weights(model, weights, "file.pt")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_statistics_of_a_state_dict():
    state = prefixed(saved(), "1.")
    assert statistics_of(state) == {}
    values = {"0.mean": torch.tensor(MEAN).view(1, 3, 1, 1), "0.std": torch.tensor(STD)}
    assert statistics_of(state | values) == {"mean": pytest.approx(list(MEAN)), "std": pytest.approx(list(STD))}
    for bad in ({"0.std": torch.ones(2)}, {"0.std": 1.0}):
        assert statistics_of(state | values | bad) == {}


def test_load_weights_refuses_another_mean_or_std():
    model = create_model("wrn-10-1-swish")
    for other in (
        torch.tensor((0.2023, 0.1994, 0.2010)),
        torch.tensor(0.25),
        torch.rand(2),
        torch.full((3,), math.nan),
    ):
        with pytest.raises(ValueError, match=r"file.pt: .* expect input of std .*the model's is 0.2471, 0.24.*--std"):
            load_weights(model, {"0.std": other, **prefixed(saved(), "1.")}, "file.pt")


def test_load_weights_of_a_model_behind_a_normalization_layer_need_one_inside():
    state = saved("wrn-10-1")
    for foreign in (prefixed(state, "module.1."), {"mean": torch.tensor(MEAN), **state}):
        with pytest.raises(ValueError, match="normalized input.*--normalize"):
            load_weights(create_model("wrn-10-1"), foreign, "file.pt")
        load_weights(create_model("wrn-10-1", mean=MEAN, std=STD, normalize=True), foreign, "file.pt")


def test_load_weights_of_an_averaged_model():
    model = create_model("wrn-10-1-swish")
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    averaged.update_parameters(randomized("wrn-10-1-swish", dtype=torch.float32))
    state = {name: value.float() if "num_batches" in name else value for name, value in averaged.state_dict().items()}
    assert "n_averaged" in state
    load_weights(model, state, "file.pt")
    assert all(torch.equal(value, averaged.module.state_dict()[name]) for name, value in model.state_dict().items())


def test_load_weights_does_without_the_counters_and_takes_other_precisions():
    state = saved()
    model = create_model("wrn-10-1-swish")
    load_weights(model, {n: v.double() for n, v in state.items() if not n.endswith("num_batches_tracked")}, "file.pt")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "module.0."])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: [], "expected a state dict .* got a list"),
        (lambda s: {}, "empty"),
        (lambda s: {**s, "epoch": 3}, "got a int under '(module.0.)?epoch'"),
        (lambda s: {**s, "more": [1.0]}, "got a list under '(module.0.)?more'"),
        (lambda s: {**s, "logits.bias": torch.zeros(10).to_sparse()}, "logits.bias is not a plain dense tensor"),
        (lambda s: {**s, "logits.bias": torch.zeros(10, device="meta")}, "logits.bias is not a plain dense tensor"),
        (lambda s: saved(num_classes=7), "weights are for 7 classes, the model has 10"),
        (
            lambda s: {**s, "logits.weight": torch.zeros(7, 9), "logits.bias": torch.zeros(7)},
            r"'logits.bias' of shape \(7,\) instead of \(10,\), 'logits.weight' of shape \(7, 9\)",
        ),
        (lambda s: saved("wrn-10-2"), "unexpected 'layer.0.block.0.shortcut.weight'$"),
        (lambda s: saved("wrn-16-1"), "unexpected 'layer.0.block.1.batchnorm_0.bias'.* and 33 more"),
        (lambda s: saved("wrn-10-1", group_norm=True), "missing 'batchnorm.running_mean', 'batchnorm.running_var'"),
        (lambda s: {n: v for n, v in s.items() if n != "logits.bias"}, "missing 'logits.bias'$"),
        (lambda s: {**s, "fc.weight": torch.zeros(1)}, "unexpected 'fc.weight'$"),
        (lambda s: {**s, "init_conv.weight": torch.zeros(16, 1, 3, 3)}, r"\(16, 1, 3, 3\) instead of \(16, 3, 3, 3\)"),
        (lambda s: {**s, "logits.bias": torch.tensor(0.0)}, r"'logits.bias' of shape \(\) instead of \(10,\)"),
        (lambda s: {**s, "logits.bias": torch.full((10,), math.nan)}, "logits.bias has NaN or infinite"),
        (lambda s: {**s, "batchnorm.running_var": torch.full((64,), math.inf)}, "running_var has NaN or infinite"),
        (lambda s: {**s, "logits.bias": torch.zeros(10, dtype=torch.long)}, "logits.bias is torch.int64"),
        (lambda s: {**s, "logits.bias": torch.zeros(10, dtype=torch.complex64)}, "logits.bias is torch.complex64"),
    ],
)
def test_load_weights_refuses_in_one_line_and_leaves_the_model_alone(prefix, change, said):
    changed = change(saved())
    model = create_model("wrn-10-1-swish")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    foreign = prefixed(changed, prefix) if isinstance(changed, dict) else changed
    with pytest.raises(ValueError, match=said) as error:
        load_weights(model, foreign, "file.pt")
    assert str(error.value).startswith("file.pt: ") and "\n" not in str(error.value) and len(str(error.value)) < 400
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
