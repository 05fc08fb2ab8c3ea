from experiments import zoo
from experiments.accuracy.published import PADDLESLIM, PEERS, best_of_peers


def test_losses_are_the_published_ones():
    losses = {name: published.loss for name, published in PADDLESLIM.items()}
    assert losses == {
        "googlenet": 0.38,
        "mobilenet_v1": 0.67,
        "mobilenet_v2": 0.54,
        "resnet50": 0.09,
        "resnet101": 2.05,
        "vgg16": 0.15,
        "vgg19": 0.01,
    }


def test_the_best_of_peers_is_the_best_of_each_figure():
    assert best_of_peers("mobilenet_v1") == (-0.15, 95.7, 17.6)
    assert best_of_peers("googlenet") == (-0.46, 98.8, 27.3)
    assert best_of_peers("vgg16") is None


def test_figures_are_of_networks_that_there_are():
    measured = {name for figures in PEERS.values() for name in figures}
    assert measured | set(PADDLESLIM) <= set(zoo.MODELS)
    assert all(set(figures) == measured for figures in PEERS.values())
