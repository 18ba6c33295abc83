#include "cuda_on_cpu.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <numeric>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

Index3View threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_cpu {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Fibers. On x86-64 a switch is fifteen instructions; elsewhere ucontext does the same, with a system call each time.

constexpr size_t kStackBytes = 256 << 10;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kWarp = 32;
constexpr size_t kDefaultShared = 48 << 10;  // what a kernel may have without asking
constexpr size_t kMaxShared = 99 << 10;      // the least of the supported architectures: 8.6, 8.9 and 12.0

void fiber_main();

#if defined(__x86_64__)
extern "C" void cuda_on_cpu_switch(void** save, void* to);
asm(R"(
.text
.globl cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");

struct Context {
  void* stack_pointer = nullptr;
  void start(char* stack) {
    // As if fiber_main had just been called: six saved registers, its address, and no return address.
    void** top = reinterpret_cast<void**>(stack + kStackBytes) - 2;
    std::fill(top - 6, top + 2, nullptr);
    top[0] = reinterpret_cast<void*>(&fiber_main);
    stack_pointer = top - 6;
  }
};

void switch_context(Context& from, Context& to) { cuda_on_cpu_switch(&from.stack_pointer, to.stack_pointer); }
#else
struct Context {
  ucontext_t context;
  void start(char* stack) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, fiber_main, 0);
  }
};

void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
#endif

enum class State { kReady, kBarrier, kCollective, kReturned };

struct Fiber : Thread {
  Context context;
  char* stack = nullptr;
  State state = State::kReady;
  unsigned index = 0;
  Index3View thread_index;
  std::source_location where;
  int predicate = 0;
  Vote vote = Vote::kNone;
  const char* name = nullptr;  // of the collective it waits in
  unsigned mask = 0;
  Complete complete = nullptr;
};

// Everything of the launch that is running. One launch at a time: a kernel is a sequential program here.
struct Machine {
  Context scheduler;
  std::vector<Fiber> fibers = std::vector<Fiber>(kMaxThreads);
  std::vector<unsigned> ready;
  Fiber* running = nullptr;
  unsigned threads = 0, returned = 0;
  const std::function<void()>* body = nullptr;
  unsigned char* dynamic = nullptr;
  size_t dynamic_bytes = 0;
  std::vector<std::pair<void*, size_t>> statics;
  std::map<const void*, size_t> allowed;
  uint64_t seed = 0, random = 0, launches = 0;
  bool failed = false;
  std::string error;
  const void* main_stack = nullptr;  // for the address sanitizer
  size_t main_stack_bytes = 0;
};

Machine& machine() {
  static Machine instance;
  return instance;
}

uint64_t next_random() {  // splitmix64
  uint64_t z = (machine().random += 0x9E3779B97F4A7C15u);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

void to_scheduler() {
  Machine& m = machine();
  Fiber& self = *m.running;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(self.state == State::kReturned ? nullptr : &fake, m.main_stack, m.main_stack_bytes);
  switch_context(self.context, m.scheduler);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  switch_context(self.context, m.scheduler);
#endif
}

void to_fiber(Fiber& fiber) {
  Machine& m = machine();
  m.running = &fiber;
  threadIdx = fiber.thread_index;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack, kStackBytes);
  switch_context(m.scheduler, fiber.context);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  switch_context(m.scheduler, fiber.context);
#endif
}

void make_ready(Fiber& fiber) {
  fiber.state = State::kReady;
  machine().ready.push_back(fiber.index);
}

std::string place(const std::source_location& where) {
  const std::string path = where.file_name();
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(where.line());
}

std::string describe(const Fiber& fiber) {
  const Index3View& t = fiber.thread_index;
  std::string text = "thread (" + std::to_string(t.x) + "," + std::to_string(t.y) + "," + std::to_string(t.z) + ")";
  if (fiber.state == State::kReturned) return text + " has returned";
  return text + " waits in " + fiber.name + " at " + place(fiber.where);
}

// ---------------------------------------------------------------------------------------------------------------------
// Warp collectives

unsigned warp_lanes(unsigned first) { return std::min(kWarp, machine().threads - first); }

// Completes the collective that `fiber` waits in if all lanes it names are there.
void try_complete(Fiber& fiber) {
  Machine& m = machine();
  const unsigned first = fiber.index / kWarp * kWarp;
  Thread* lanes[kWarp] = {};
  unsigned present = 0;
  for (unsigned lane = 0; lane < warp_lanes(first); ++lane) {
    Fiber& other = m.fibers[first + lane];
    lanes[lane] = &other;
    if (!(fiber.mask >> lane & 1) || other.state == State::kReturned) continue;
    if (other.state != State::kCollective || other.complete != fiber.complete || other.mask != fiber.mask) return;
    present |= 1u << lane;
  }
  fiber.complete(lanes, fiber.mask, present);
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (present >> lane & 1) make_ready(m.fibers[first + lane]);
  }
}

void fiber_main() {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &m.main_stack, &m.main_stack_bytes);
#endif
  (*m.body)();
  Fiber& self = *m.running;
  self.state = State::kReturned;
  ++m.returned;
  // Lanes that wait for this one need not any more.
  const unsigned first = self.index / kWarp * kWarp;
  for (unsigned lane = 0; lane < warp_lanes(first); ++lane) {
    Fiber& other = m.fibers[first + lane];
    if (other.state == State::kCollective && (other.mask >> (self.index - first) & 1)) {
      try_complete(other);
      break;
    }
  }
  to_scheduler();
  std::abort();  // a fiber that has returned is never resumed
}

// ---------------------------------------------------------------------------------------------------------------------
// Barriers. Called when no thread can run; lets the block go on, or says why it cannot.

void resolve_barrier() {
  Machine& m = machine();
  const Fiber* waiting = nullptr;
  const Fiber* other = nullptr;
  for (unsigned i = 0; i < m.threads; ++i) {
    const Fiber& fiber = m.fibers[i];
    if (!waiting && fiber.state != State::kReturned) waiting = &fiber;
  }
  for (unsigned i = 0; i < m.threads && !other; ++i) {
    const Fiber& fiber = m.fibers[i];
    const bool same_place = fiber.vote == waiting->vote && fiber.where.line() == waiting->where.line() &&
                            std::strcmp(fiber.where.file_name(), waiting->where.file_name()) == 0;
    const bool together = fiber.state == waiting->state && (fiber.state != State::kBarrier || same_place);
    if (!together && &fiber != waiting) other = &fiber;
  }
  if (other || waiting->state != State::kBarrier) {
    m.failed = true;
    m.error =
        "divergence: " + describe(*waiting) + (other ? " while " + describe(*other) : " for lanes that never come");
    return;
  }
  int count = 0;
  for (unsigned i = 0; i < m.threads; ++i) count += m.fibers[i].predicate != 0;
  for (unsigned i = 0; i < m.threads; ++i) {
    Fiber& fiber = m.fibers[i];
    const bool all = count == static_cast<int>(m.threads);
    fiber.predicate = fiber.vote == Vote::kAnd ? all : fiber.vote == Vote::kOr ? count > 0 : count;
    make_ready(fiber);
  }
}

void run_block(const Index3& block) {
  Machine& m = machine();
  if (m.dynamic_bytes) std::memset(m.dynamic, kPoison, m.dynamic_bytes);
  for (const auto& [memory, bytes] : m.statics) std::memset(memory, kPoison, bytes);
  m.ready.clear();
  m.returned = 0;
  for (unsigned i = 0; i < m.threads; ++i) {
    Fiber& fiber = m.fibers[i];
    if (!fiber.stack) {
      fiber.stack = static_cast<char*>(
          mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
      if (fiber.stack == MAP_FAILED) std::abort();
      mprotect(fiber.stack, 4096, PROT_NONE);  // an overflow faults
    }
#if defined(__SANITIZE_ADDRESS__)
    // A kernel that failed left its frames, and their red zones, behind.
    ASAN_UNPOISON_MEMORY_REGION(fiber.stack + 4096, kStackBytes - 4096);
#endif
    fiber.index = i;
    fiber.thread_index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
    fiber.context.start(fiber.stack);
    make_ready(fiber);
  }
  if (m.seed == 0) std::reverse(m.ready.begin(), m.ready.end());
  while (m.returned < m.threads && !m.failed) {
    if (m.ready.empty()) {
      resolve_barrier();
      if (m.seed == 0) std::reverse(m.ready.begin(), m.ready.end());
      continue;
    }
    if (m.seed != 0) std::swap(m.ready[next_random() % m.ready.size()], m.ready.back());
    Fiber& fiber = m.fibers[m.ready.back()];
    m.ready.pop_back();
    to_fiber(fiber);
  }
}

}  // namespace

int barrier(Vote vote, int predicate, const std::source_location& where) {
  Fiber& self = *machine().running;
  self.state = State::kBarrier;
  self.name = "__syncthreads";
  self.where = where;
  self.vote = vote;
  self.predicate = predicate;
  to_scheduler();
  return self.predicate;
}

uint64_t collective(const char* name, unsigned mask, Complete complete, uint64_t in, int arg, int width,
                    const std::source_location& where) {
  Fiber& self = *machine().running;
  self.state = State::kCollective;
  self.name = name;
  self.where = where;
  self.mask = mask;
  self.complete = complete;
  self.in = in;
  self.arg = arg;
  self.width = width;
  if (!(mask >> (self.index % kWarp) & 1))
    fail(std::string(name) + " at " + place(where) + ": mask leaves out its caller");
  try_complete(self);
  to_scheduler();
  return self.out;
}

unsigned char* dynamic_shared() { return machine().dynamic; }

StaticShared::StaticShared(size_t bytes) : memory_(std::malloc(bytes)) {
  std::memset(memory_, kPoison, bytes);
  machine().statics.emplace_back(memory_, bytes);
}

void fail(const std::string& what) {
  Machine& m = machine();
  if (!m.failed) m.error = what;
  m.failed = true;
  to_scheduler();
  std::abort();
}

unsigned lane_id() { return machine().running->index % kWarp; }

int launch(const void* kernel, Index3 grid, Index3 block, size_t shared_bytes, const std::function<void()>& body) {
  Machine& m = machine();
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64 || blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  const auto allowed = m.allowed.find(kernel);
  if (shared_bytes > (allowed == m.allowed.end() ? kDefaultShared : allowed->second)) return cudaErrorInvalidValue;
  ++m.launches;
  m.threads = static_cast<unsigned>(threads);
  m.body = &body;
  m.random = m.seed;
  m.failed = false;
  m.dynamic_bytes = shared_bytes;
  void* memory = nullptr;
  if (shared_bytes && posix_memalign(&memory, 128, shared_bytes) != 0) return cudaErrorMemoryAllocation;
  m.dynamic = static_cast<unsigned char*>(memory);
  blockDim = {block.x, block.y, block.z};
  gridDim = {grid.x, grid.y, grid.z};
  std::vector<uint64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  if (m.seed != 0) {
    for (uint64_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
  }
  for (const uint64_t i : order) {
    if (m.failed) break;
    blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                static_cast<unsigned>(i / grid.x / grid.y)};
    run_block(block);
  }
  std::free(memory);
  m.dynamic = nullptr;
  return m.failed ? cudaErrorLaunchFailure : cudaSuccess;
}

void allow_shared(const void* kernel, size_t bytes) { machine().allowed[kernel] = std::min(bytes, kMaxShared); }
void set_seed(uint64_t seed) { machine().seed = seed; }
std::string take_error() { return std::exchange(machine().error, {}); }
uint64_t launches() { return machine().launches; }

}  // namespace cuda_on_cpu
