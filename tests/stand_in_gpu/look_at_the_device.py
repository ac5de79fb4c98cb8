"""Asserts that the stand-in is a device: it does what a CPU does to the bit, and refuses what a GPU refuses."""

import os

import torch
import torch_cuda

assert torch.cuda.is_available() and torch.cuda.device_count() == 1
gpu = torch.device("cuda", 0)

# there and back; views share memory, in-place operators write to it, storages grow
x = torch.randn(6, 4)
y = x.to(gpu)
assert y.device == gpu and torch.equal(y.cpu(), x) and y.cpu().device.type == "cpu"
y.view(2, 12)[:, 1:3].t().zero_()
x.view(2, 12)[:, 1:3].t().zero_()
assert torch.equal(y.cpu(), x) and y[1:].data_ptr() == y.data_ptr() + 4 * y.element_size()
grown = torch.empty(0, device=gpu)
assert grown.resize_(5).fill_(2.0).sum().item() == 10 and grown.shape == (5,)
assert torch.equal(torch.topk(y, 2).indices.cpu(), torch.topk(x, 2).indices)
assert y[torch.tensor([0, 2])].device == gpu and y[y > 0].device == gpu
with torch.inference_mode():
    assert torch.nn.Linear(4, 3).to(gpu)(y).is_inference()

# devices are not mixed, but for numbers
for mixed in (lambda: y + x, lambda: y @ torch.ones(4, 2), lambda: torch.cat([y, x]), lambda: x.add_(y)):
    try:
        mixed()
    except RuntimeError as error:
        assert "Expected all tensors to be on the same device" in str(error), error
    else:
        raise AssertionError("an operator took a tensor of the CPU beside one of the device")
assert (y + torch.tensor(2.0)).device == gpu

# a step of training
models = [torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 4)) for _ in range(2)]
models[1].load_state_dict(models[0].state_dict())
models[1].to(gpu)
for model, inputs in zip(models, (x, y), strict=True):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with torch.autocast(inputs.device.type, dtype=torch.bfloat16):
        model(inputs).float().pow(2).sum().backward()
    optimizer.step()
for expected, found in zip(models[0].parameters(), models[1].parameters(), strict=True):
    assert found.is_cuda and found.grad.is_cuda and torch.equal(found.cpu(), expected)
    assert torch.equal(found.grad.cpu(), expected.grad)

# FlashAttention is that of the CPU, and so is its gradient
q = torch.randn(1, 2, 40, 16, dtype=torch.bfloat16)
results = []
for device in ("cpu", gpu):
    leaf = q.detach().to(device).requires_grad_()
    out = torch.nn.functional.scaled_dot_product_attention(leaf, leaf, leaf, is_causal=True)
    out.float().sum().backward()
    results.append((out.detach().cpu(), leaf.grad.cpu()))
assert all(map(torch.equal, *results))

# what is allocated is counted, and ends
torch.cuda.reset_peak_memory_stats()
before = torch.cuda.memory_allocated()
block = torch.empty(1 << 20, device=gpu)
doubled = block * 2
assert torch.cuda.memory_allocated() - before == 8 << 20
del doubled
assert torch.cuda.memory_allocated() - before == 4 << 20
assert torch.cuda.max_memory_allocated() - before == 8 << 20
torch_cuda.set_capacity(before + (6 << 20))
try:
    block * 2
except torch.OutOfMemoryError as error:
    assert "CUDA out of memory" in str(error)
else:
    raise AssertionError("there was more than there is")

# a graph repeats what was captured, on what its inputs hold by then
held, total = torch.ones(3, device=gpu), torch.zeros(3, device=gpu)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    assert torch.cuda.is_current_stream_capturing()
    made = held * 3
    total.add_(made)
assert total.sum() == 0
for value in (1.0, 2.0):
    held.fill_(value)
    graph.replay()
assert made.tolist() == [6.0] * 3 and total.tolist() == [9.0] * 3
print("a device", flush=True)
os._exit(0)  # autograd's thread may still hold the last graph: to let go of it while Python ends stops the process
