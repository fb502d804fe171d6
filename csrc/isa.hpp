// Instruction sets. The kernels are compiled once for each; one that the processor supports is chosen at run time.
#pragma once

#include <string>
#include <vector>

#include "kernels.hpp"

namespace fastdiff {

// Returns the kernels of all instruction sets that this build contains and this processor supports, the best one first.
std::vector<const Kernels*> available_kernels();

// Returns the kernels that emulate an instruction set, for tests: they are slow. Builds to be installed have none.
std::vector<const Kernels*> emulated_kernels();

// Returns the kernels of the given name ("avx512"), or the first of available_kernels() if the name is empty.
// Throws std::invalid_argument, which lists the available ones, if there are none of that name.
const Kernels& choose_kernels(const std::string& name);

}  // namespace fastdiff
