// Read before each C++ file of ggml's Vulkan backend (-include), for tests on Mesa's software device of Debian 12. llama.cpp's source stays as it is.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>
#include <vulkan/vulkan_core.h>

// 1. VK_EXT_layer_settings, which Vulkan headers before 1.3.272 lack. ggml-vulkan.cpp names its types once, to ask a validation layer for
// advice. The structures are those of the specification, since they are handed to vkCreateInstance in any case.
#ifndef VK_EXT_layer_settings
namespace vk {
enum class LayerSettingTypeEXT : int32_t { eBool32 = 0 };

struct LayerSettingEXT { // VkLayerSettingEXT
    const char *layer;
    const char *name;
    LayerSettingTypeEXT type;
    uint32_t count;
    const void *values;
};

struct LayerSettingsCreateInfoEXT { // VkLayerSettingsCreateInfoEXT
    explicit LayerSettingsCreateInfoEXT(const std::vector<LayerSettingEXT> &all)
        : count(static_cast<uint32_t>(all.size())), settings(all.data()) {}
    VkStructureType type = static_cast<VkStructureType>(1000496000); // VK_STRUCTURE_TYPE_LAYER_SETTINGS_CREATE_INFO_EXT
    const void *next = nullptr;
    uint32_t count;
    const LayerSettingEXT *settings;
};
} // namespace vk
#endif

// 2. Buffers are not destroyed; their memory is freed. ggml's descriptor sets have room for twelve buffers, and what an operation with fewer
// leaves there may name a buffer that is gone. Vulkan allows it, since no shader reads it. Mesa 22.3's software device follows all twelve.
namespace test_build {
inline void keep_buffer(VkDevice, VkBuffer, const VkAllocationCallbacks *) {}

// 3. ggml asks whether a graph is done without a pause between two questions. The device is the same processor: the question waits a millisecond.
inline VkResult fence_status(VkDevice device, VkFence fence) {
    const VkResult result = vkWaitForFences(device, 1, &fence, VK_TRUE, 1000000);
    return result == VK_TIMEOUT ? VK_NOT_READY : result;
}
} // namespace test_build

// Inline, so that a file that does not use it (CMake's tests of the compiler) links without the library.
inline PFN_vkVoidFunction test_build_function(VkInstance instance, const char *name) {
    if (std::strcmp(name, "vkDestroyBuffer") == 0) return reinterpret_cast<PFN_vkVoidFunction>(&test_build::keep_buffer);
    if (std::strcmp(name, "vkGetFenceStatus") == 0) return reinterpret_cast<PFN_vkVoidFunction>(&test_build::fence_status);
    return vkGetInstanceProcAddr(instance, name);
}
#define vkGetInstanceProcAddr test_build_function
