// The ways in which the field writes momentum. To the kernels a formulation is a choice of three
// numbers.
#pragma once

#include <optional>
#include <string_view>

#include "../update_rule.h"

namespace momentum_ext::binding {

enum class Formulation : uint8_t {
  kTorch,      // b = mu b + (1 - dampening) g, from b = g;   p = p - lr b
  kClassical,  // v = mu v + lr g, from 0;                    p = p - v
  kEma,        // v = mu v + (1 - mu) g, from 0;              p = p - lr v
};

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

// Fills in alpha, first_alpha, nesterov_alpha and step. Without momentum all formulations are plain
// gradient descent.
inline void choose_coefficients(Formulation formulation, double lr, double dampening,
                                Coefficients<double>& c) {
  if (formulation == Formulation::kTorch || c.momentum == 0) {
    c.alpha = 1 - dampening;
    c.first_alpha = c.nesterov_alpha = 1;
    c.step = lr;
  } else if (formulation == Formulation::kClassical) {
    c.alpha = c.first_alpha = c.nesterov_alpha = lr;
    c.step = 1;
  } else {
    c.alpha = c.first_alpha = c.nesterov_alpha = 1 - c.momentum;
    c.step = lr;
  }
}

}  // namespace momentum_ext::binding
