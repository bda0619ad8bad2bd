// A cache of the CUDA driver's answers, so that a launch need not ask what an earlier one has asked. No torch.
//
// Terms: docs/glossary.md.
#pragma once
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <mutex>

namespace convmixer_fast::cuda {

// Keeps the answers to the last kEntries questions that were not in it. Several threads may use it at once.
template <class Question, class Answer, size_t kEntries>
class AnswerCache {
 public:
  // The answer that is kept, or else that of ask(answer), which is kept unless its status is an error.
  template <class Ask>
  cudaError_t get(const Question& question, Answer& answer, const Ask& ask) {
    if (find(question, answer)) return cudaSuccess;
    // Without the lock, so that no thread waits for another one's driver call. If two ask the same, they get the same.
    const cudaError_t status = ask(answer);
    if (status == cudaSuccess) keep(question, answer);
    return status;
  }

 private:
  struct Entry {
    Question question;
    Answer answer;
  };

  bool find(const Question& question, Answer& answer) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = 0; i < std::min(kept_, kEntries); i++) {
      if (!(entries_[i].question == question)) continue;
      answer = entries_[i].answer;
      return true;
    }
    return false;
  }

  void keep(const Question& question, const Answer& answer) {
    const std::lock_guard<std::mutex> lock(mutex_);
    entries_[kept_++ % kEntries] = {question, answer};
  }

  std::mutex mutex_;
  std::array<Entry, kEntries> entries_{};
  size_t kept_ = 0;  // answers so far, with those that later ones have replaced
};

}  // namespace convmixer_fast::cuda
