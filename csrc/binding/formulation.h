// The formulations of momentum by name.
#pragma once

#include <optional>
#include <string_view>

#include "../rules/sgd.h"

namespace momentum_ext::binding {

inline const char* to_string(Formulation formulation) {
  switch (formulation) {
    case Formulation::kTorch:
      return "torch";
    case Formulation::kClassical:
      return "classical";
    default:
      return "ema";
  }
}

inline std::optional<Formulation> formulation_named(std::string_view name) {
  for (const Formulation each : {Formulation::kTorch, Formulation::kClassical, Formulation::kEma}) {
    if (name == to_string(each)) return each;
  }
  return std::nullopt;
}

}  // namespace momentum_ext::binding
