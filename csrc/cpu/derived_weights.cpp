#include "cpu/derived_weights.h"

#include <pthread.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <tuple>
#include <vector>

#include "cpu/out_of_memory.h"
#include "cpu/scratch.h"

namespace fusedcnn::cpu {

namespace {

bool same(const DerivedKey& a, const DerivedKey& b) {
  const auto all = [](const DerivedKey& k) {
    return std::make_tuple(k.kernel, k.weight, k.strides.n, k.strides.c, k.strides.h, k.strides.w,
                           k.type, k.out_channels, k.in_channels, k.kernel_h, k.kernel_w);
  };
  return all(a) == all(b);
}

}  // namespace

struct DerivedEntry {
  DerivedKey key;
  int64_t bytes;
  int64_t floats;
  bool usable = false;
  float* data;  // [floats], then the copy of the weight's bytes

  DerivedEntry(const DerivedKey& key, int64_t bytes, int64_t floats)
      : key(key), bytes(bytes), floats(floats) {
    const int64_t rounded = (size() + 63) / 64 * 64;
    data = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(rounded)));
    if (!data) throw OutOfMemory(rounded);
  }
  ~DerivedEntry() { std::free(data); }
  DerivedEntry(const DerivedEntry&) = delete;
  DerivedEntry& operator=(const DerivedEntry&) = delete;

  int64_t size() const { return floats * int64_t{sizeof(float)} + bytes; }
  void* copy() const { return data + floats; }
};

namespace {

// Of all entries together: the 3x3 layers of a VGG-16 need 120 MB, those of small networks a few.
constexpr int64_t kMostBytes = int64_t{128} << 20;

// Entries are complete and never written while they are in here; least recently used first.
struct Cache {
  std::mutex mutex;
  std::vector<std::shared_ptr<DerivedEntry>> entries;
  int64_t bytes = 0;

  // Takes the entry out, or returns null. The mutex is held.
  std::shared_ptr<DerivedEntry> take(const DerivedKey& key) {
    const auto at = std::find_if(entries.begin(), entries.end(),
                                 [&](const auto& entry) { return same(entry->key, key); });
    if (at == entries.end()) return nullptr;
    std::shared_ptr<DerivedEntry> entry = std::move(*at);
    entries.erase(at);
    bytes -= entry->size();
    return entry;
  }

  void put(std::shared_ptr<DerivedEntry> entry) {
    entries.push_back(std::move(entry));
    bytes += entries.back()->size();
    while (bytes > kMostBytes) {
      bytes -= entries.front()->size();
      entries.erase(entries.begin());
    }
  }
};

// Never destroyed: threads may still compute while the process ends.
Cache& cache() {
  static Cache& the_cache = []() -> Cache& {
    // A fork while another thread holds the mutex would leave it locked in the child for good.
    pthread_atfork([] { cache().mutex.lock(); }, [] { cache().mutex.unlock(); },
                   [] { cache().mutex.unlock(); });
    return *new Cache;
  }();
  return the_cache;
}

}  // namespace

DerivedWeights::DerivedWeights(const DerivedKey& key, int64_t bytes, int64_t floats)
    : filled_(false) {
  if (bytes > 0) {
    Cache& all = cache();
    const std::lock_guard<std::mutex> lock(all.mutex);
    entry_ = all.take(key);
    if (entry_) all.put(entry_);  // now the most recently used
  }
  if (entry_ && entry_->bytes == bytes && entry_->floats == floats) {
    filled_ = std::memcmp(entry_->copy(), key.weight, static_cast<size_t>(bytes)) == 0;
    if (filled_) return;
    // Stale. Its memory serves again unless another call is still reading it.
    Cache& all = cache();
    const std::lock_guard<std::mutex> lock(all.mutex);
    const std::shared_ptr<DerivedEntry> taken = all.take(key);
    if (taken && taken != entry_) all.put(taken);  // another call has replaced it meanwhile
    if (taken != entry_ || taken.use_count() > 2) entry_ = nullptr;
  } else {
    entry_ = nullptr;
  }
  if (!entry_) entry_ = std::make_shared<DerivedEntry>(key, bytes, floats);
  if (on_new_memory) on_new_memory(entry_->data, floats * int64_t{sizeof(float)});
  // Deriving from the copy, not from the weight, keeps the two together even if another thread
  // writes to the weight meanwhile.
  if (bytes > 0) std::memcpy(entry_->copy(), key.weight, static_cast<size_t>(bytes));
}

DerivedWeights::~DerivedWeights() = default;

float* DerivedWeights::data() const { return entry_->data; }

const void* DerivedWeights::source() const {
  return entry_->bytes > 0 ? entry_->copy() : entry_->key.weight;
}

bool DerivedWeights::usable() const { return entry_->usable; }

void DerivedWeights::keep(bool usable) {
  entry_->usable = usable;
  filled_ = true;
  if (entry_->bytes == 0 || entry_->size() > kMostBytes) return;
  Cache& all = cache();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.take(entry_->key);  // an equal one, of another thread
  all.put(entry_);
}

}  // namespace fusedcnn::cpu
