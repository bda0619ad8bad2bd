// AnswerCache without a driver: what is asked again and what is not, and many threads at once. Prints what went wrong;
// the exit status is the number of complaints.
#include "../csrc/cuda/common/answer_cache.h"

#include <atomic>
#include <cstdio>
#include <thread>
#include <vector>

using convmixer_fast::cuda::AnswerCache;

namespace {

struct Answer {  // of 16 bytes, so that half of another one would be noticed
  long question;
  long square;
};

constexpr int kEntries = 4;
constexpr int kRefused = -1;  // a question whose answer is an error

std::atomic<int> complaints{0};

void expect(bool holds, const char* what) {
  if (holds) return;
  ++complaints;
  std::printf("%s\n", what);
}

// Puts questions to one cache and counts those that reach the driver.
struct Driver {
  AnswerCache<int, Answer, kEntries> answers;
  std::atomic<int> asked{0};

  void put(int question) {
    Answer answer{};
    const cudaError_t status = answers.get(question, answer, [&](Answer& given) {
      ++asked;
      given = {question, long{question} * question};
      return question == kRefused ? cudaErrorUnknown : cudaSuccess;
    });
    if (question == kRefused) return expect(status == cudaErrorUnknown, "an error was taken for an answer");
    expect(status == cudaSuccess && answer.question == question && answer.square == long{question} * question,
           "a wrong answer");
  }

  int asked_by(std::initializer_list<int> questions) {
    const int before = asked;
    for (int question : questions) put(question);
    return asked - before;
  }
};

void one_thread() {
  static Driver driver;
  expect(driver.asked_by({0, 0, 1, 0, 1}) == 2, "an answer was not kept");
  expect(driver.asked_by({kRefused, kRefused, kRefused}) == 3, "an error was kept");
  expect(driver.asked_by({2, 3, 0, 1, 2, 3}) == 2, "fewer answers were kept than there are entries");
  expect(driver.asked_by({4, 1, 2, 3, 4}) == 1, "a new answer replaced others than the oldest");
  expect(driver.asked_by({0, 2, 3, 4, 0}) == 1, "the oldest answer was not replaced");
}

constexpr int kThreads = 4;

void many_threads(int questions) {
  Driver driver;
  std::vector<std::thread> threads;
  for (int first = 0; first < kThreads; ++first)
    threads.emplace_back([&, first] {
      for (int i = 0; i < 5000; ++i) driver.put((first + i) % questions);
    });
  for (std::thread& thread : threads) thread.join();
  if (questions == 1) expect(driver.asked <= kThreads, "a thread asked what it had asked before");
}

}  // namespace

int main() {
  one_thread();
  for (int questions : {1, kEntries, 3 * kEntries}) many_threads(questions);
  return complaints;
}
