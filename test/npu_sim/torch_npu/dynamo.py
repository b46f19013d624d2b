"""The dynamo backend "npu". torch_npu's compiles with torchair; this one runs the captured graph as it is."""

import os


def register() -> None:
    """Only where NPU_SIM_COMPILER asks for it: importing dynamo takes seconds."""
    if os.environ.get("NPU_SIM_COMPILER"):
        import torch._dynamo

        torch._dynamo.register_backend(run_graph, "npu")


def run_graph(graph_module, example_inputs, **options):
    from torch_npu.report import facts

    facts["compiled_nodes"] = facts.get("compiled_nodes", 0) + len(graph_module.graph.nodes)
    return graph_module.forward
