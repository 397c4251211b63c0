#include "cpu/kernel_table.h"

namespace qops::cpu::QOPS_ISA_NS {

#define QOPS_ENTRY(name, Params) &name,
const KernelTable kKernels = {QOPS_FOR_EACH_CPU_KERNEL(QOPS_ENTRY)};
#undef QOPS_ENTRY

}  // namespace qops::cpu::QOPS_ISA_NS
