// Runs an .onnx or .ort file on one input: classify MODEL INPUT OUTPUT, the last two float32 in row-major order.
//
//   g++ -std=c++17 -O2 -I"$include" classify.cc "$library" -Wl,-rpath,"$(dirname "$library")" -o classify
//   ./classify model.onnx image.f32 logits.f32
//
// include: where onnxruntime_cxx_api.h is, in `headers` of the Android archive (AAR), in the iOS framework, in Debian's
// libonnxruntime-dev. library: libonnxruntime.so of the same or of a later version.
#include <onnxruntime_cxx_api.h>

#include <functional>
#include <iostream>
#include <numeric>
#include <string>
#include <vector>

#include "../values.h"

class Classifier {
 public:
  explicit Classifier(const std::string& path)
      : environment_(ORT_LOGGING_LEVEL_WARNING, "jaxquant"), session_(environment_, path.c_str(), Ort::SessionOptions{}) {
    Ort::AllocatorWithDefaultOptions allocator;
    input_ = session_.GetInputNameAllocated(0, allocator).get();
    output_ = session_.GetOutputNameAllocated(0, allocator).get();
    shape_ = session_.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape();
    for (int64_t& size : shape_) size = size < 0 ? 1 : size;  // one image, where the batch varies
  }

  // The output for an input, both in row-major order; threads may call it at a time.
  std::vector<float> operator()(std::vector<float> input) {
    const size_t values = std::accumulate(shape_.begin(), shape_.end(), size_t{1}, std::multiplies<>());
    if (input.size() != values) {
      throw std::invalid_argument(
          std::to_string(input.size()) + " values where the model takes " + std::to_string(values));
    }
    auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    auto given = Ort::Value::CreateTensor<float>(memory, input.data(), input.size(), shape_.data(), shape_.size());
    const char* inputs[] = {input_.c_str()};
    const char* outputs[] = {output_.c_str()};
    auto results = session_.Run(Ort::RunOptions{}, inputs, &given, 1, outputs, 1);
    const float* first = results[0].GetTensorData<float>();
    return {first, first + results[0].GetTensorTypeAndShapeInfo().GetElementCount()};
  }

 private:
  Ort::Env environment_;
  Ort::Session session_;
  std::string input_, output_;
  std::vector<int64_t> shape_;
};

int main(int count, char** arguments) {
  if (count != 4) {
    std::cerr << "usage: classify MODEL INPUT OUTPUT\n";
    return 2;
  }
  try {
    Classifier classifier(arguments[1]);
    write_values(arguments[3], classifier(read_values(arguments[2])));
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
