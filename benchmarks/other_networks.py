"""Networks beside those of cpu_models.py, of the same families and of others: kedge beside ONNX Runtime and OpenVINO.

python benchmarks/other_networks.py                              # all, one thread, on a quiet machine
python benchmarks/other_networks.py --models edsr,tcn --seconds 1
python benchmarks/other_networks.py --smoke                      # narrow networks, checks outputs, judges no figure
python benchmarks/other_networks.py --table benchmarks/results/other-networks-DATE.json   # for docs/performance.md

Measured as cpu_models.py does it (see there), with one compile of each. A run of all writes
benchmarks/results/other-networks-DATE.json. The exit status is 1 where an output is wrong or kedge refuses a model.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import harness
from cpu_models import RESULTS, SMOKE_WIDTH, Settings, benchmark, say, tables, wrong
from models import (
    Model,
    Net,
    channels,
    classifier,
    convnext,
    densenet,
    detector,
    efficientnet_b0,
    residual,
    resnet,
    resnet18,
    vgg,
)
from rich.console import Console

Row = dict[str, Any]


def layer(net: Net, name: str, x: str, size: int, kernel: int = 3, stride: int = 1, **options: Any) -> str:
    """Convolution, batch normalization, ReLU."""
    return net.relu(
        f"{name}.relu", net.batch_norm(f"{name}.bn", net.conv(f"{name}.conv", x, size, kernel, stride, **options))
    )


def to_space(net: Net, name: str, x: str, factor: int) -> str:
    """Depth to space."""
    batch, count, height, width = net.shapes[x]
    shape = (batch, count // factor**2, height * factor, width * factor)
    return net.node("DepthToSpace", name, [x], shape, net.power[x], blocksize=factor, mode="CRD")


def edsr(net: Net, x: str, width: float) -> str:
    """EDSR, baseline, twice the size (Lim et al., arXiv:1707.02921): residual blocks without normalization."""
    size = channels(64, width)
    head = y = net.conv("head", x, size, 3, bias=True)
    for number in range(16):
        z = net.relu(f"body.{number}.relu", net.conv(f"body.{number}.0", y, size, 3, bias=True))
        y = net.add(f"body.{number}.add", y, net.conv(f"body.{number}.1", z, size, 3, bias=True))
    y = net.add("add", net.conv("body.last", y, size, 3, bias=True), head)
    return net.conv("tail", to_space(net, "up", net.conv("up.conv", y, 4 * size, 3, bias=True), 2), 3, 3, bias=True)


def espcn(net: Net, x: str, width: float) -> str:
    """ESPCN, three times the size (Shi et al., arXiv:1609.05158)."""
    for number, (size, kernel) in enumerate(((64, 5), (64, 3), (32, 3))):
        x = net.conv(f"conv{number}", x, channels(size, width), kernel, bias=True)
        x = net.node("Tanh", f"tanh{number}", [x], net.shapes[x], 0.4)
    return to_space(net, "up", net.conv("last", x, 9, 3, bias=True), 3)


def pyramid(net: Net, x: str, width: float) -> str:
    """A feature pyramid (Lin et al., arXiv:1612.03144) over stages of residual blocks; its finest level."""
    x = net.pool("MaxPool", "maxpool", layer(net, "stem", x, channels(64, width), 7, 2), 3, 2, 1)
    levels = []
    for stage in range(4):
        for number in range(2):
            stride = 2 if stage and not number else 1
            x = residual(net, f"layer{stage}.{number}", x, channels(64 << stage, width), stride, bottleneck=False)
        levels.append(x)
    size = channels(128, width)
    y = net.conv("lateral3", levels[-1], size, 1, bias=True)
    for number in reversed(range(3)):
        y = net.add(
            f"add{number}",
            net.upsample(f"up{number}", y),
            net.conv(f"lateral{number}", levels[number], size, 1, bias=True),
        )
        y = net.conv(f"smooth{number}", y, size, 3, bias=True)
    return y


def alexnet(net: Net, x: str, width: float) -> str:
    """AlexNet as torchvision has it (Krizhevsky, arXiv:1404.5997)."""
    for number, (size, kernel, stride, pad, pooled) in enumerate(
        ((64, 11, 4, 2, True), (192, 5, 1, 2, True), (384, 3, 1, 1, False), (256, 3, 1, 1, False), (256, 3, 1, 1, True))
    ):
        x = net.relu(
            f"relu{number}", net.conv(f"conv{number}", x, channels(size, width), kernel, stride, pad=pad, bias=True)
        )
        x = net.pool("MaxPool", f"pool{number}", x, 3, 2) if pooled else x
    x = net.flatten("flatten", x)
    for number in range(2):
        x = net.relu(f"fc{number}.relu", net.gemm(f"fc{number}", x, channels(4096, width)))
    return net.gemm("fc2", x, 1000)


def googlenet(net: Net, x: str, width: float) -> str:
    """GoogLeNet with batch normalization (Szegedy et al., arXiv:1409.4842)."""
    x = net.pool("MaxPool", "pool1", layer(net, "conv1", x, channels(64, width), 7, 2), 3, 2, 1)
    x = layer(net, "conv3", layer(net, "conv2", x, channels(64, width), 1), channels(192, width))
    parts = (
        (64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64), (192, 96, 208, 16, 48, 64), (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64), (112, 144, 288, 32, 64, 64), (256, 160, 320, 32, 128, 128),
        (256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128),
    )  # fmt: skip
    for number, part in enumerate(parts):
        if number in (0, 2, 7):
            x = net.pool("MaxPool", f"pool.{number}", x, 3, 2, 1)
        one, before3, three, before5, five, pooled = (channels(size, width) for size in part)
        name = f"inception.{number}"
        branches = [
            layer(net, f"{name}.1", x, one, 1),
            layer(net, f"{name}.3", layer(net, f"{name}.3r", x, before3, 1), three),
            layer(net, f"{name}.5", layer(net, f"{name}.5r", x, before5, 1), five),
            layer(net, f"{name}.p", net.pool("MaxPool", f"{name}.pool", x, 3, 1, 1), pooled, 1),
        ]
        x = net.concat(f"{name}.concat", branches)
    return classifier(net, x)


def small_resnet(net: Net, x: str, width: float, depth: int, wide: int) -> str:
    """ResNets of images of 32x32 (He et al., arXiv:1512.03385), wide ones with `wide` (arXiv:1605.07146)."""
    x = layer(net, "stem", x, channels(16, width))
    for stage in range(3):
        for number in range(depth):
            size, stride = channels((16 * wide) << stage, width), 2 if stage and not number else 1
            x = residual(net, f"layer{stage}.{number}", x, size, stride, bottleneck=False)
    return classifier(net, x, classes=10)


def stereo(net: Net, x: str, width: float) -> str:
    """Features for the comparison of two images: 5x5 convolutions."""
    for number in range(6):
        x = layer(net, f"conv{number}", x, channels(32, width), 5, 2 if number == 0 else 1)
    return net.conv("last", x, channels(32, width), 3, bias=True)


def mixer(net: Net, x: str, width: float) -> str:
    """MLP-Mixer S/32 (Tolstikhin et al., arXiv:2105.01601)."""
    size = channels(512, width)
    x = net.conv("stem", x, size, 32, 32, pad=0, bias=True)
    batch, _, height, breadth = net.shapes[x]
    x = net.transpose("patches", net.reshape("flat", x, (batch, size, height * breadth)), (0, 2, 1))
    for number in range(8):
        y = net.transpose(f"{number}.turned", net.layer_norm(f"{number}.norm1", x), (0, 2, 1))
        y = net.linear(
            f"{number}.tokens2",
            net.gelu(f"{number}.gelu1", net.linear(f"{number}.tokens1", y, size // 2)),
            height * breadth,
        )
        x = net.add(f"{number}.add1", x, net.transpose(f"{number}.back", y, (0, 2, 1)))
        y = net.gelu(
            f"{number}.gelu2", net.linear(f"{number}.channels1", net.layer_norm(f"{number}.norm2", x), 4 * size)
        )
        x = net.add(f"{number}.add2", x, net.linear(f"{number}.channels2", y, size))
    return net.linear("head", net.layer_norm("norm", x), 1000)


def volume_resnet(net: Net, x: str, width: float) -> str:
    """A small residual network over 3-D images."""
    x = layer(net, "stem", x, channels(32, width), 3, 2)
    for stage in range(3):
        x = residual(net, f"layer{stage}", x, channels(32 << stage, width), 2 if stage else 1, bottleneck=False)
    return classifier(net, x, classes=400)


def c3d(net: Net, x: str, width: float) -> str:
    """After C3D (Tran et al., arXiv:1412.0767): 3x3x3 convolutions, pooling in all dims."""
    for number, (size, pooled) in enumerate(((64, True), (128, True), (256, False), (256, True))):
        x = net.relu(f"relu{number}", net.conv(f"conv{number}", x, channels(size, width), 3, bias=True))
        x = net.pool("MaxPool", f"pool{number}", x, 2, 2) if pooled else x
    return classifier(net, x, classes=101)


def squeezenet(net: Net, x: str, width: float) -> str:
    """SqueezeNet 1.1 (Iandola et al., arXiv:1602.07360)."""
    x = net.relu("relu", net.conv("conv1", x, channels(64, width), 3, 2, bias=True))
    for number, size in enumerate((16, 16, 32, 32, 48, 48, 64, 64)):
        x = net.pool("MaxPool", f"pool{number}", x, 3, 2) if number in (0, 2, 4) else x
        name, squeezed = f"fire{number}", channels(size, width)
        x = net.relu(f"{name}.relu", net.conv(f"{name}.squeeze", x, squeezed, 1, bias=True))
        x = net.concat(
            f"{name}.concat",
            [net.relu(f"{name}.relu{k}", net.conv(f"{name}.expand{k}", x, 4 * squeezed, k, bias=True)) for k in (1, 3)],
        )
    return net.flatten("flatten", net.global_pool("avgpool", net.conv("last", x, 1000, 1, bias=True)))


def xception(net: Net, x: str, width: float) -> str:
    """After Xception (Chollet, arXiv:1610.02357): separable convolutions, dilated ones as segmentation has them."""

    def separable(name: str, x: str, size: int, stride: int = 1, dilation: int = 1) -> str:
        count = net.shapes[x][1]
        x = net.batch_norm(
            f"{name}.dw.bn", net.conv(f"{name}.dw", x, count, 3, stride, groups=count, dilation=dilation)
        )
        return layer(net, name, x, size, 1)

    x = layer(net, "stem", x, channels(32, width), 3, 2)
    for number, size in enumerate((64, 128, 256)):
        x = separable(f"entry{number}", x, channels(size, width), 2)
    for number in range(6):
        x = net.add(f"add{number}", x, separable(f"middle{number}", x, channels(256, width), dilation=2))
    return net.conv("last", x, 21, 1, bias=True)


def lenet(net: Net, x: str, width: float) -> str:
    """LeNet-5 with ReLU and maxima (LeCun et al., 1998)."""
    for number, size in enumerate((6, 16)):
        x = net.relu(f"relu{number}", net.conv(f"conv{number}", x, size, 5, bias=True, pad=2 if number == 0 else 0))
        x = net.pool("MaxPool", f"pool{number}", x, 2, 2)
    x = net.flatten("flatten", x)
    for number, size in enumerate((120, 84)):
        x = net.relu(f"fc{number}.relu", net.gemm(f"fc{number}", x, size))
    return net.gemm("fc2", x, 10)


def keywords(net: Net, x: str, width: float) -> str:
    """DS-CNN (Zhang et al., arXiv:1711.07128), over 49 frames of 10 features."""
    x = layer(net, "stem", x, channels(64, width), 5, 2)
    for number in range(4):
        count = net.shapes[x][1]
        x = layer(net, f"pw{number}", layer(net, f"dw{number}", x, count, 3, groups=count), count, 1)
    return classifier(net, x, classes=12)


def dilated(net: Net, x: str, width: float, size: int, layers: int, kernel: int) -> str:
    """Dilated convolutions over a sequence, after WaveNet (arXiv:1609.03499) and TCN (arXiv:1803.01271)."""
    x = net.conv("stem", x, channels(size, width), 1, bias=True)
    for number in range(layers):
        y = net.conv(f"conv{number}", x, net.shapes[x][1], kernel, dilation=1 << number % 8, bias=True)
        x = net.add(f"add{number}", x, net.relu(f"relu{number}", y))
    return net.conv("last", x, 10, 1, bias=True)


def autoencoder(net: Net, x: str, width: float) -> str:
    """Convolutions with stride down, transposed ones up."""
    for number, size in enumerate((32, 64, 128)):
        x = layer(net, f"down{number}", x, channels(size, width), 3, 2)
    for number, size in enumerate((64, 32, 16)):
        x = net.relu(f"up{number}.relu", net.up_conv(f"up{number}", x, channels(size, width)))
    return net.conv("last", x, 3, 3, bias=True)


def dcgan(net: Net, x: str, width: float) -> str:
    """The generator of DCGAN (Radford et al., arXiv:1511.06434): 100 numbers to an image of 64x64."""
    for number, size in enumerate((512, 256, 128, 64)):
        stride, pad = (2, 1) if number else (1, 0)
        x = net.up_conv(f"up{number}", x, channels(size, width), 4, stride, pad, bias=False)
        x = net.relu(f"up{number}.relu", net.batch_norm(f"up{number}.bn", x))
    x = net.up_conv("last", x, 3, 4, 2, 1, bias=False)
    return net.node("Tanh", "tanh", [x], net.shapes[x], 0.4)


def regnet(net: Net, x: str, width: float) -> str:
    """After RegNet (Radosavovic et al., arXiv:2003.13678): bottlenecks, 3x3 convolutions in groups of 16 channels."""
    x = layer(net, "stem", x, channels(32, width), 3, 2)
    for stage, (size, depth) in enumerate(((64, 1), (144, 3), (320, 8), (784, 2))):
        for number in range(depth):
            name, stride, count = (
                f"stage{stage}.{number}",
                1 if number else 2,
                max(16, channels(size, width) // 16 * 16),
            )
            y = layer(net, f"{name}.b", layer(net, f"{name}.a", x, count, 1), count, 3, stride, groups=count // 16)
            y = net.batch_norm(f"{name}.c.bn", net.conv(f"{name}.c", y, count, 1), 0.5)
            if number == 0:
                x = net.batch_norm(f"{name}.skip.bn", net.conv(f"{name}.skip", x, count, 1, stride))
            x = net.relu(f"{name}.relu", net.add(f"{name}.add", x, y))
    return classifier(net, x)


def dense(net: Net, x: str, width: float, growth: int) -> str:
    return densenet(net, x, channels(growth, width))


NETWORKS = {
    model.name: model
    for model in (
        Model("edsr", "EDSR, 96x120", edsr, (96, 120)),
        Model("espcn", "ESPCN, 90x120", espcn, (90, 120), channels=1),
        Model("fpn", "FPN, 256x320", pyramid, (256, 320)),
        Model("vgg11", "VGG-11, 160x160", partial(vgg, depths=(1, 1, 2, 2, 2)), (160, 160)),
        Model("resnet18-8", "ResNet-18, batch 8", resnet18, batch=8),
        Model("resnet18-odd", "ResNet-18, 97x131", resnet18, (97, 131)),
        Model("resnet34", "ResNet-34", partial(resnet, depths=(3, 4, 6, 3), bottleneck=False)),
        Model("densenet-12", "DenseNet, growth 12", partial(dense, growth=12)),
        Model("densenet-24", "DenseNet, growth 24", partial(dense, growth=24)),
        Model("densenet-48", "DenseNet, growth 48", partial(dense, growth=48)),
        Model("googlenet", "GoogLeNet", googlenet),
        Model("alexnet", "AlexNet", alexnet),
        Model("wrn28-4", "Wide ResNet-28-4, 32x32", partial(small_resnet, depth=4, wide=4), (32, 32)),
        Model("resnet20", "ResNet-20, 32x32", partial(small_resnet, depth=3, wide=1), (32, 32)),
        Model("resnet20-64", "ResNet-20, 32x32, batch 64", partial(small_resnet, depth=3, wide=1), (32, 32), batch=64),
        Model("detector-320", "YOLO-like detector, 320x320", detector, (320, 320)),
        Model("stereo", "stereo, 5x5 convolutions", stereo, (128, 256)),
        Model("regnet", "RegNetX-like", regnet),
        Model("convnext-s", "ConvNeXt-S, batch 2", partial(convnext, depths=(3, 3, 27, 3)), batch=2),
        Model("mixer", "MLP-Mixer S/32", mixer),
        Model("resnet3d", "3-D ResNet, 8x56x56", volume_resnet, (8, 56, 56)),
        Model("c3d", "C3D-like, 16x56x56", c3d, (16, 56, 56)),
        Model("efficientnet-4", "EfficientNet-B0, batch 4", efficientnet_b0, batch=4),
        Model("squeezenet", "SqueezeNet 1.1", squeezenet),
        Model("xception", "Xception-like, dilated, 128x160", xception, (128, 160)),
        Model("lenet", "LeNet", lenet, (28, 28), channels=1),
        Model("lenet-64", "LeNet, batch 64", lenet, (28, 28), batch=64, channels=1),
        Model("ds-cnn", "DS-CNN, 49x10", keywords, (49, 10), channels=1),
        Model("ds-cnn-16", "DS-CNN, 49x10, batch 16", keywords, (49, 10), batch=16, channels=1),
        Model("wavenet", "WaveNet-like, 1-D", partial(dilated, size=64, layers=16, kernel=3), (2048,), channels=1),
        Model("tcn", "TCN, 25 channels", partial(dilated, size=25, layers=8, kernel=7), (784,), channels=1),
        Model(
            "tcn-8",
            "TCN, 25 channels, batch 8",
            partial(dilated, size=25, layers=8, kernel=7),
            (784,),
            batch=8,
            channels=1,
        ),
        Model("autoencoder", "convolutional autoencoder, 56x88", autoencoder, (56, 88)),
        Model("dcgan", "DCGAN generator", dcgan, (1, 1), channels=100),
        Model("dcgan-16", "DCGAN generator, batch 16", dcgan, (1, 1), batch=16, channels=100),
    )
}


def table(rows: Sequence[Row]) -> str:
    """The ratios at one thread as Markdown, the least first, in two columns."""
    found = sorted(
        (at["ratio"], row["title"]) for row in rows for at in row["runs"] if at["threads"] == 1 and "ratio" in at
    )
    half = -(-len(found) // 2)
    cells = [f"{title} | {ratio:.2f}" for ratio, title in found] + [" | "] * (2 * half - len(found))
    lines = ["| network | ratio | network | ratio |", "|---|---|---|---|"]
    lines += [f"| {left} | {right} |" for left, right in zip(cells[:half], cells[half:], strict=True)]
    return "\n".join(lines)


def parse_names(text: str) -> list[str]:
    unknown = [name for name in text.split(",") if name not in NETWORKS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(NETWORKS)}")
    return list(dict.fromkeys(text.split(",")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=parse_names, metavar="NAME,…", help=f"some of {', '.join(NETWORKS)}")
    parser.add_argument("--seconds", type=float, default=4.0, help="measured for each runtime (default: 4)")
    parser.add_argument("--smoke", action="store_true", help="narrow networks, two calls, no result file")
    parser.add_argument(
        "--table", type=Path, metavar="FILE.json", help="print a result as the table of the documentation"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="the result file")
    parser.add_argument("--note", default="", help="about the machine, for the result file: what else it did")
    options = parser.parse_args()
    if options.table is not None:
        print(table(json.loads(options.table.read_text())["models"]))
        return 0
    date = datetime.date.today().isoformat()
    settings = Settings(
        threads=[1], size=None, batch=None, width=SMOKE_WIDTH if options.smoke else 1.0,
        seconds=0.0 if options.smoke else options.seconds, compile=False,
    )  # fmt: skip
    result: Row = {"date": date, "note": options.note, "machine": harness.machine(), "models": []}
    for name in options.models or NETWORKS:
        with tempfile.TemporaryDirectory(prefix="kedge-bench-") as folder:
            result["models"].append(benchmark(NETWORKS[name], Path(folder), settings))
    whole = not (options.smoke or options.models)
    path = options.output or (RESULTS / f"other-networks-{date}.json" if whole else None)
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n")
        say(f"written to {path}")
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)
    for each in tables(result["models"]):
        console.print(each)
    mistakes = wrong(result["models"])
    for line in mistakes:
        say(f"WRONG: {line}")
    return 1 if mistakes else 0


if __name__ == "__main__":
    sys.exit(main())
