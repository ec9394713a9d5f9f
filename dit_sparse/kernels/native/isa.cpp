// SPDX-License-Identifier: Apache-2.0
// The kernel for one instruction set: compiled once for each, see build.json.
#include "call.h"

namespace ISA {
int32_t work(Call&) { return NO_INSTRUCTIONS; }
}  // namespace ISA
