import torch

from aligned_reid.device import Accelerator
from aligned_reid.device.base import trained_parameters
from aligned_reid.model import AlignedReID


def test_norms_and_biases_form_a_group_without_weight_decay(small_trunk):
    model = AlignedReID(3, pretrained="none", bnneck=True, pooling="gem")
    model.train_heads(local=False, identity=True)
    trained = {id(one) for one in model.parameters() if one.requires_grad}
    assert {id(one) for one in trained_parameters(model)} == trained
    decayed, others = trained_parameters(model, decay_norms=False)
    assert {id(one) for one in decayed["params"] + others["params"]} == trained
    names = {id(one): name for name, one in model.named_parameters()}
    assert {names[id(one)] for one in others["params"]} == {
        "base.bn1.weight",
        "base.bn1.bias",
        "base.conv2.bias",
        "pooling.p",
        "neck.weight",
    }


def test_weight_decay_shrinks_the_decayed_group_only():
    decayed, kept = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    groups = [{"params": [decayed]}, {"params": [kept], "weight_decay": 0.0}]
    optimizer = Accelerator().adam(groups, lr=0.1, weight_decay=0.1)
    decayed.grad, kept.grad = torch.zeros(2), torch.zeros(2)
    optimizer.step()
    assert (decayed < 1).all()
    assert (kept == 1).all()
