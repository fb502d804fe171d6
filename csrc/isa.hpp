// Instruction sets: the kernels are compiled once for each, and the best one the processor has is chosen at run time.
#pragma once

#include <string>
#include <vector>

#include "kernels.hpp"

namespace fastdiff {

// Every instruction set that this build knows and this processor has, best first.
std::vector<const Kernels*> available_kernels();

// By name ("avx512"), or the first of available_kernels() where it is empty.
// Throws std::invalid_argument naming the available ones.
const Kernels& choose_kernels(const std::string& name);

}  // namespace fastdiff
