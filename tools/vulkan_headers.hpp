// VK_EXT_layer_settings for Vulkan headers older than 1.3.272 (Debian 12 has 1.3.239), which lack it. ggml-vulkan.cpp names its
// types once, to ask a validation layer for advice. The compiler reads this file first (-include): llama.cpp's source stays as it is.
// The structures are those of the Vulkan specification, since they are handed to vkCreateInstance in any case.
#pragma once
#include <cstdint>
#include <vector>
#include <vulkan/vulkan_core.h>

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
