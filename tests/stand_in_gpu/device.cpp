// A CUDA device that is this machine's memory, for a torch that was built without CUDA.
//
// Tensors on cuda:0 are real ones: they have a device, storage that views share, autograd. Whatever operator comes with
// one is run by the CPU's kernel on the same memory, and what it makes is on the device. So results are the CPU's to the
// bit, and what differs is what Python sees: where tensors are, which kernels are chosen, what is said to the device.
// As on a GPU, an operator refuses to mix the device's tensors with the CPU's, but for numbers, copies and indices.
// It counts what is allocated, and has as much memory as it is told to have.
//
// It must be loaded after libtorch_cpu and before Python's torch, which asks once whether there is CUDA.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/SDPBackend.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <mutex>
#include <set>
#include <unordered_map>

namespace {

using c10::DataPtr;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::IValue;
using c10::Storage;
using c10::StorageImpl;
using c10::Stream;
using c10::TensorImpl;

const Device GPU(DeviceType::CUDA, 0);
const Device CPU(DeviceType::CPU);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return GPU; }
  Device getDevice() const override { return GPU; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, GPU); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, GPU); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, GPU); }
  Stream getStreamFromGlobalPool(Device, bool) const override { return Stream(Stream::DEFAULT, GPU); }
  Stream exchangeStream(Stream) const override { return Stream(Stream::DEFAULT, GPU); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  // all work is done when its call returns
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const DataPtr&, const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// ---- memory

struct Count {
  std::mutex mutex;
  int64_t now = 0, peak = 0, limit = int64_t(80) << 30;

  void take(int64_t num_bytes) {
    std::lock_guard<std::mutex> lock(mutex);
    TORCH_CHECK_WITH(OutOfMemoryError, now + num_bytes <= limit, "CUDA out of memory. Tried to allocate ", num_bytes,
                     " bytes. GPU 0 has a total capacity of ", limit, " bytes of which ", limit - now, " are free.");
    now += num_bytes;
    peak = std::max(peak, now);
  }
  void give_back(int64_t num_bytes) {
    std::lock_guard<std::mutex> lock(mutex);
    now -= num_bytes;
  }
} count;

// What keeps memory of the device: `Held` is a CPU's DataPtr or a whole Storage.
template <class Held>
struct Counted {
  Held held;
  int64_t num_bytes;
  static void release(void* counted) {
    count.give_back(static_cast<Counted*>(counted)->num_bytes);
    delete static_cast<Counted*>(counted);
  }
};

// `num_bytes` that were taken already.
template <class Held>
DataPtr on_gpu(void* at, Held&& held, int64_t num_bytes) {
  return {at, new Counted<Held>{std::move(held), num_bytes}, &Counted<Held>::release, GPU};
}

struct Allocator final : c10::Allocator {
  DataPtr allocate(size_t num_bytes) override {
    count.take(num_bytes);
    auto host = c10::GetCPUAllocator()->allocate(num_bytes);
    void* at = host.get();
    return on_gpu(at, std::move(host), num_bytes);
  }
  void copy_data(void* to, const void* from, size_t num_bytes) const override { default_copy_data(to, from, num_bytes); }
} allocator;

struct PinnedAllocator final : c10::Allocator {
  static std::mutex mutex;
  static std::set<const void*> places;

  static void unpin(void* held) {
    auto* data = static_cast<DataPtr*>(held);
    {
      std::lock_guard<std::mutex> lock(mutex);
      places.erase(data->get());
    }
    delete data;
  }
  DataPtr allocate(size_t num_bytes) override {
    auto* data = new DataPtr(c10::GetCPUAllocator()->allocate(num_bytes));
    std::lock_guard<std::mutex> lock(mutex);
    places.insert(data->get());
    return {data->get(), data, &unpin, CPU};
  }
  void copy_data(void* to, const void* from, size_t num_bytes) const override { default_copy_data(to, from, num_bytes); }
} pinned_allocator;
std::mutex PinnedAllocator::mutex;
std::set<const void*> PinnedAllocator::places;

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void* at) const override {
    std::lock_guard<std::mutex> lock(PinnedAllocator::mutex);
    return PinnedAllocator::places.count(at) > 0;
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &allocator; }
  void deviceSynchronize(DeviceIndex) const override {}
  Device getDeviceFromPtr(void*) const override { return GPU; }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
};

// ---- operators

// Sizes, strides and flags of `from` on `to`.
void shape_like(TensorImpl* to, const at::Tensor& from) {
  to->set_sizes_and_strides(from.sizes(), from.strides(), from.storage_offset());
  if (from.is_conj()) to->_set_conj(true);
  if (from.is_neg()) to->_set_neg(true);
}

at::Tensor as_cpu(Storage storage, const at::Tensor& tensor) {
  auto made = at::detail::make_tensor<TensorImpl>(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                  tensor.dtype());
  auto* impl = made.unsafeGetTensorImpl();
  shape_like(impl, tensor);
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return made;
}

// The tensors of one call, as the CPU's kernel sees them ("aliases"), and what becomes of them.
class Call {
 public:
  at::Tensor alias(const at::Tensor& tensor) {
    if (!tensor.is_cuda()) {
      of_cpu_.insert(tensor.unsafeGetTensorImpl());
      return tensor;
    }
    auto made = as_cpu(alias(tensor.storage()), tensor);
    originals_.emplace(made.unsafeGetTensorImpl(), tensor);
    owners_.emplace(made.storage().unsafeGetStorageImpl(), tensor);
    aliases_.push_back(made);
    return made;
  }

  Storage alias(const Storage& storage) {
    auto found = storage_aliases_.find(storage.unsafeGetStorageImpl());
    if (found != storage_aliases_.end()) return found->second;
    Storage made(Storage::use_byte_size_t(), storage.nbytes(), DataPtr(storage.mutable_data(), CPU),
                 c10::GetCPUAllocator(), true);
    storage_aliases_.emplace(storage.unsafeGetStorageImpl(), made);
    storages_.emplace(made.unsafeGetStorageImpl(), storage);
    return made;
  }

  // Arguments that the call resized, or gave another storage.
  void settle() {
    for (const auto& made : aliases_) {
      const auto& own = originals_.at(made.unsafeGetTensorImpl());
      auto* impl = own.unsafeGetTensorImpl();
      Storage storage = original(made.storage());
      if (storage.unsafeGetStorageImpl() != own.storage().unsafeGetStorageImpl())
        impl->set_storage_keep_dtype(storage);
      if (made.sizes() != own.sizes() || made.strides() != own.strides() ||
          made.storage_offset() != own.storage_offset())
        impl->set_sizes_and_strides(made.sizes(), made.strides(), made.storage_offset());
    }
  }

  at::Tensor original(const at::Tensor& tensor) {
    if (!tensor.defined() || of_cpu_.count(tensor.unsafeGetTensorImpl())) return tensor;
    auto found = originals_.find(tensor.unsafeGetTensorImpl());
    if (found != originals_.end()) return found->second;
    auto owner = owners_.find(tensor.storage().unsafeGetStorageImpl());
    auto storage = original(tensor.storage());
    at::Tensor made = owner == owners_.end()
        ? at::detail::make_tensor<TensorImpl>(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                              tensor.dtype())
        // a view of an inference tensor is one, of another tensor is none
        : at::detail::make_tensor<TensorImpl>(TensorImpl::VIEW, std::move(storage), owner->second.key_set(),
                                              tensor.dtype());
    shape_like(made.unsafeGetTensorImpl(), tensor);
    return made;
  }

 private:
  // The device's storage of what the kernel left in a CPU's: an argument's own, perhaps grown, or a new one.
  Storage original(const Storage& storage) {
    auto* impl = storage.unsafeGetStorageImpl();
    const int64_t num_bytes = impl->nbytes();
    auto found = storages_.find(impl);
    if (found == storages_.end()) {
      count.take(num_bytes);
      Storage made(Storage::use_byte_size_t(), num_bytes, on_gpu(impl->mutable_data(), Storage(storage), num_bytes),
                   &allocator, true);
      storages_.emplace(impl, made);
      return made;
    }
    Storage own = found->second;
    if (own.data() != storage.data() || own.nbytes() != storage.nbytes()) {
      count.take(num_bytes);
      auto host = impl->set_data_ptr(DataPtr(nullptr, CPU));
      void* at = host.get();
      own.unsafeGetStorageImpl()->set_data_ptr_noswap(on_gpu(at, std::move(host), num_bytes));
      own.unsafeGetStorageImpl()->set_nbytes(num_bytes);
      impl->set_data_ptr_noswap(DataPtr(at, CPU));
    }
    return own;
  }

  std::vector<at::Tensor> aliases_;
  std::unordered_map<TensorImpl*, at::Tensor> originals_;
  std::set<TensorImpl*> of_cpu_;
  std::unordered_map<StorageImpl*, at::Tensor> owners_;  // a tensor with that storage
  std::unordered_map<StorageImpl*, Storage> storages_, storage_aliases_;
};

bool may_mix(const std::string& operator_name) {
  return operator_name == "aten::copy_" || operator_name == "aten::_copy_from" ||
         operator_name == "aten::_copy_from_and_resize" || operator_name == "aten::set_" ||
         operator_name.rfind("aten::index", 0) == 0 || operator_name == "aten::_index_put_impl_";
}

// Products whose halves a CPU multiplies in float32, as a GPU adds them up: many CPUs' own products of bfloat16 take
// four to forty times as long. torch hands them a place for the result.
bool is_product(const c10::FunctionSchema& schema) {
  static const std::set<std::string> names = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"};
  return schema.overload_name() == "out" && names.count(schema.name()) > 0;
}

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  Call call;
  const bool is_of_floats = is_product(schema);
  at::Tensor halves;  // where such a product goes
  auto see = [&](const at::Tensor& tensor) -> at::Tensor {
    if (!tensor.defined()) return tensor;
    TORCH_CHECK(tensor.is_cuda() || tensor.dim() == 0 || may_mix(schema.name()),
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and ",
                tensor.device(), "! (in ", schema.name(), ")");
    return call.alias(tensor);
  };
  for (auto i = stack->size() - schema.arguments().size(); i < stack->size(); i++) {
    IValue& value = (*stack)[i];
    if (value.isTensor()) {
      at::Tensor seen = see(value.toTensor());
      if (is_of_floats && (seen.scalar_type() == at::kBFloat16 || seen.scalar_type() == at::kHalf)) {
        if (i + 1 == stack->size()) halves = seen;
        seen = seen.to(at::kFloat);
      }
      value = seen;
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> all;
      for (const at::Tensor& tensor : value.toTensorVector()) all.push_back(see(tensor));
      value = all;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> all;
      for (const auto& tensor : value.toOptionalTensorVector())
        all.push_back(tensor ? std::optional<at::Tensor>(see(*tensor)) : std::nullopt);
      value = all;
    } else if (value.isDevice()) {
      value = CPU;
    } else if (value.isStorage()) {
      value = IValue(call.alias(value.toStorage()));
    }
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  call.settle();
  for (auto i = stack->size() - schema.returns().size(); i < stack->size(); i++) {
    IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = call.original(halves.defined() ? halves.copy_(value.toTensor()) : value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> all;
      for (const at::Tensor& tensor : value.toTensorVector()) all.push_back(call.original(tensor));
      value = all;
    }
  }
}

void do_nothing(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  torch::jit::drop(*stack, op.schema().arguments().size());
}

// The same memory as a tensor of the CPU, for a library that takes no other.
at::Tensor host_view(const at::Tensor& tensor) {
  const auto& storage = tensor.storage();
  DataPtr data(storage.mutable_data(), new Storage(storage), [](void* held) { delete static_cast<Storage*>(held); },
               CPU);
  return as_cpu(Storage(Storage::use_byte_size_t(), storage.nbytes(), std::move(data), nullptr, false), tensor);
}

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

// What scaled_dot_product_attention takes: FlashAttention where a GPU's would serve (torch_cuda.py has it).
int64_t choose_attention(const at::Tensor& q, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>& mask,
                         double, bool, std::optional<double>, bool) {
  const bool is_half = q.scalar_type() == at::kBFloat16 || q.scalar_type() == at::kHalf;
  const bool serves = is_half && !mask && q.size(-1) <= 256 && at::globalContext().userEnabledFlashSDP();
  return static_cast<int64_t>(serves ? at::SDPBackend::flash_attention : at::SDPBackend::math);
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  // for all devices there is one that looks for a kernel of each
  library.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  // for devices that have none there is one of smaller operators
  library.impl("silu_backward", torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  library.impl("_fused_sdp_choice", &choose_attention);
  library.impl("record_stream", torch::CppFunction::makeFromBoxedFunction<&do_nothing>());
}

TORCH_LIBRARY(stand_in, library) { library.def("host_view(Tensor(a) tensor) -> Tensor(a)"); }
TORCH_LIBRARY_IMPL(stand_in, CUDA, library) { library.impl("host_view", &host_view); }

const bool registered = [] {
  c10::SetAllocator(DeviceType::CUDA, &allocator, 100);
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&choose_attention);
  return true;
}();

}  // namespace

namespace at {
using CUDAHooks = Hooks;  // the name under which torch looks for it
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

extern "C" {
int64_t stand_in_allocated() { return count.now; }
int64_t stand_in_peak() { return count.peak; }
void stand_in_reset_peak() { count.peak = count.now; }
int64_t stand_in_capacity() { return count.limit; }
void stand_in_set_capacity(int64_t num_bytes) { count.limit = num_bytes; }
}
