// Moving parameters between Nesterov's two points, in one pass over all tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace momentum_ext::binding {

// params[i] += distances[i] * momentum_buffers[i], with lookaheads[i] keeping what was there; with
// `back`, the reverse, to the bit where nothing was changed in between. The shapes are checked
// first.
void move_lookahead(const std::vector<at::Tensor>& params,
                    const std::vector<at::Tensor>& momentum_buffers,
                    const std::vector<at::Tensor>& lookaheads, const std::vector<double>& distances,
                    bool back);

}  // namespace momentum_ext::binding
