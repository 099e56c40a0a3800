// A device guard for two CUDA devices that do not exist. It keeps the current device and remembers where events are
// recorded; memory and kernels are those of fake tensors.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
thread_local c10::DeviceIndex current = 0;
thread_local c10::DeviceIndex recorded = -1;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  static c10::Device at(c10::DeviceIndex index) { return {c10::DeviceType::CUDA, index}; }
  c10::Device getDevice() const override { return at(current); }
  void setDevice(c10::Device device) const override { current = device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = device.index(); }
  c10::Device exchangeDevice(c10::Device device) const override { return at(std::exchange(current, device.index())); }
  c10::DeviceIndex deviceCount() const noexcept override { return 2; }
  c10::Stream getStream(c10::Device device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  void record(void**, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    recorded = stream.device_index();
  }
  void synchronizeEvent(void*) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}  // namespace

extern "C" int current_device() { return current; }
extern "C" int recorded_on() { return recorded; }
extern "C" void set_current(int index) { current = static_cast<c10::DeviceIndex>(index); }
