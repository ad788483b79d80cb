// The host side of marlin_small.cu in C++: ops that launch what Python has planned, in 1-2 microseconds a call.
//
// Python compiles a kernel, decides how it is cut and registers that as a plan (kernels/extension.py). A call with a
// plan is launched here; any other (a first call, more than 16 tokens, other dtypes or strides) goes to the op's
// implementation in Python, which the dispatcher knows as `..._python`. Nothing of CUDA's toolkit is needed to build
// this: the driver's functions come as addresses. PyTorch's stable ABI (2.11 on) is all that it links to.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <stdexcept>
#include <string>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// CUlaunchAttribute and CUlaunchConfig of cuda.h.
struct Attribute {
  int id, pad;
  unsigned value[16];
};
struct Config {
  unsigned grid[3], block[3], shared;
  void* stream;
  Attribute* attributes;
  unsigned count;
};
constexpr int PROGRAMMATIC_STREAM_SERIALIZATION = 6;
constexpr int SWIZZLE_128_BYTES = 3, PROMOTE_256_BYTES = 3, HALF = 6, BFLOAT = 9;  // of tensor maps
constexpr int64_t MOST_TOKENS = 16, MOST_DIMS = 8, STRIPS = 4, CHANNELS = 64;

int (*launch_kernel)(const Config*, void* function, void** parameters, void** extra);
int (*encode_map)(void* map, int type, unsigned rank, void* address, const uint64_t* sizes, const uint64_t* strides,
                  const uint32_t* box, const uint32_t* steps, int interleave, int swizzle, int promotion, int fill);
int (*current_device)(int*);
int (*current_stream)(int32_t device, void** stream);

struct Plan {
  void* function;
  unsigned blocks, threads, shared;
};
// Device, activations and scales in bfloat16, group, gated; blocks of rows and channels; tokens.
using Key = std::array<int64_t, 8>;
std::map<Key, Plan> plans;
std::shared_mutex plans_lock;

// Weight of marlin_small.cu.
struct Weight {
  const void *packed, *bias, *residual;
  void* y;
  int first, n;
};

struct alignas(64) Map {
  uint64_t words[16];
  const void* address;
  int64_t tokens, channels;
  unsigned box;
  bool bfloat;
};

// The tensor map of activations; a few are kept, since a model's buffers come back.
const Map& map_of(const void* address, int64_t tokens, int64_t channels, unsigned box, bool bfloat) {
  thread_local Map kept[64] = {};
  Map& map = kept[(reinterpret_cast<uintptr_t>(address) >> 9 ^ channels >> 6 ^ tokens) & 63];
  if (map.address == address && map.tokens == tokens && map.channels == channels && map.box == box && map.bfloat == bfloat)
    return map;
  const uint64_t sizes[2] = {uint64_t(channels), uint64_t(tokens)}, strides[1] = {uint64_t(channels) * 2};
  const uint32_t corners[2] = {CHANNELS, box}, steps[2] = {1, 1};
  map.address = nullptr;
  const int status = encode_map(map.words, bfloat ? BFLOAT : HALF, 2, const_cast<void*>(address), sizes, strides,
                                corners, steps, 0, SWIZZLE_128_BYTES, PROMOTE_256_BYTES, 0);
  if (status) throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(status));
  map.address = address, map.tokens = tokens, map.channels = channels, map.box = box, map.bfloat = bfloat;
  return map;
}

const void* address_of(const std::optional<Tensor>& tensor) { return tensor ? tensor->data_ptr() : nullptr; }

// Whether an operand is as a kernel reads it: of the activations' dtype, without gaps.
bool fits(const std::optional<Tensor>& tensor, const Tensor& x) {
  return !tensor || (tensor->scalar_type() == x.scalar_type() && tensor->is_contiguous());
}

// A tensor without contents like x (..., K), of shape (..., n): from torch's allocator, past the dispatcher.
Tensor empty_like_with(const Tensor& x, int64_t n) {
  int64_t dims = x.dim(), sizes[MOST_DIMS], strides[MOST_DIMS], step = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    sizes[i] = i + 1 < dims ? x.size(i) : n;
    strides[i] = step, step *= sizes[i];
  }
  int32_t dtype, type;
  AtenTensorHandle out;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, dtype, type, x.get_device_index(), &out));
  return Tensor(out);
}

// Launches the product of x with `packed`, and with `up` if that is given, if there is a plan for it.
std::optional<Tensor> launch(const Tensor& x, const Tensor& packed, const Tensor* up, const std::optional<Tensor>& bias,
                             const std::optional<Tensor>& residual, int64_t n, int64_t group, bool bfloat_scales) {
  const ScalarType dtype = x.scalar_type();
  const bool bfloat = dtype == ScalarType::BFloat16;
  if (!launch_kernel || !(bfloat || dtype == ScalarType::Half) || !x.is_contiguous()) return {};
  if (!fits(bias, x) || !fits(residual, x)) return {};
  const int64_t dims = x.dim(), k = x.size(dims - 1), tokens = k ? x.numel() / k : 0;
  const void* address = x.data_ptr();
  if (tokens < 1 || tokens > MOST_TOKENS || dims > MOST_DIMS || k % 8 || reinterpret_cast<uintptr_t>(address) % 16) return {};
  int device = 0;
  if (current_device(&device) || device != x.get_device_index()) return {};
  unsigned most = 1;
  while (most < tokens) most *= 2;
  const int64_t rows = packed.size(0), columns = packed.size(1);
  Plan plan;
  {
    std::shared_lock lock(plans_lock);
    const auto found = plans.find({device, bfloat, bfloat_scales, group, up != nullptr, rows, columns, most});
    if (found == plans.end()) return {};
    plan = found->second;
  }
  Tensor out = empty_like_with(x, n);

  Weight weights[2] = {{packed.data_ptr(), address_of(bias), address_of(residual), out.data_ptr(), 0, int(n)}};
  if (up) weights[1] = {up->data_ptr(), nullptr, nullptr, out.data_ptr(), 0, int(n)};
  int counts[4] = {int(tokens), int(rows * STRIPS), int(columns), int(most)};
  void* parameters[] = {const_cast<Map*>(&map_of(address, tokens, k, most, bfloat)), weights, counts, counts + 1,
                        counts + 2, counts + 3};
  Attribute attribute = {PROGRAMMATIC_STREAM_SERIALIZATION, 0, {1}};
  Config config = {{plan.blocks, 1, 1}, {plan.threads, 1, 1}, plan.shared, nullptr, &attribute, 1};
  if (const int status = current_stream(device, &config.stream))
    throw std::runtime_error("no current stream: error " + std::to_string(status));
  if (const int status = launch_kernel(&config, plan.function, parameters, nullptr))
    throw std::runtime_error("cuLaunchKernelEx: error " + std::to_string(status));
  return out;
}

template <size_t N>
Tensor in_python(const char* op, std::array<StableIValue, N> stack) {
  if (torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION)) throw std::runtime_error(std::string(op) + " failed");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

template <class T>
StableIValue value(const T& of) {
  return torch::stable::detail::from(of);
}

Tensor linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t n, int64_t group,
              bool bfloat_scales) {
  if (auto out = launch(x, packed, nullptr, bias, {}, n, group, bfloat_scales)) return *out;
  return in_python<6>("awqc::qlinear_marlin_python",
                      {value(x), value(packed), value(bias), value(n), value(group), value(bfloat_scales)});
}

Tensor gated(const Tensor& x, const Tensor& gate, const Tensor& up, int64_t n, int64_t group, bool bfloat_scales) {
  if (auto out = launch(x, gate, &up, {}, {}, n, group, bfloat_scales)) return *out;
  return in_python<6>("awqc::qlinear_marlin_gated_python",
                      {value(x), value(gate), value(up), value(n), value(group), value(bfloat_scales)});
}

Tensor add(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, const Tensor& residual, int64_t n,
           int64_t group, bool bfloat_scales) {
  if (auto out = launch(x, packed, nullptr, bias, residual, n, group, bfloat_scales)) return *out;
  return in_python<7>("awqc::qlinear_marlin_add_python", {value(x), value(packed), value(bias), value(residual),
                                                          value(n), value(group), value(bfloat_scales)});
}

}  // namespace

// Addresses of the driver's cuLaunchKernelEx, cuTensorMapEncodeTiled and cuCtxGetDevice, and of torch's current stream.
extern "C" void awqc_connect(void* launch, void* encode, void* device, void* stream) {
  launch_kernel = reinterpret_cast<decltype(launch_kernel)>(launch);
  encode_map = reinterpret_cast<decltype(encode_map)>(encode);
  current_device = reinterpret_cast<decltype(current_device)>(device);
  current_stream = reinterpret_cast<decltype(current_stream)>(stream);
}

extern "C" void awqc_plan(const int64_t* key, void* function, unsigned blocks, unsigned threads, unsigned shared) {
  Key own;
  std::memcpy(own.data(), key, sizeof own);
  std::unique_lock lock(plans_lock);
  plans[own] = {function, blocks, threads, shared};
}

#ifndef DEVICE
#define DEVICE CUDA
#endif
STABLE_TORCH_LIBRARY_IMPL(awqc, DEVICE, library) {
  library.impl("qlinear_marlin", TORCH_BOX(&linear));
  library.impl("qlinear_marlin_gated", TORCH_BOX(&gated));
  library.impl("qlinear_marlin_add", TORCH_BOX(&add));
}
