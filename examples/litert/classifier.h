// A .tflite file of jaxquant's, with one float32 input and one float32 output of fixed sizes, in LiteRT.
//
//   Classifier classifier("model.tflite");
//   std::vector<float> logits = classifier(image);  // [1, 224, 224, 3] -> [1, 1000]
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "litert.h"

class Classifier {
 public:
  explicit Classifier(const std::string& path) {
    try {
      load(path);
    } catch (...) {  // no destructor runs for what was never constructed
      release();
      throw;
    }
  }
  ~Classifier() { release(); }
  Classifier(const Classifier&) = delete;
  Classifier& operator=(const Classifier&) = delete;

  // The output for an input, both in row-major order. Not to be called by two threads at a time.
  std::vector<float> operator()(const std::vector<float>& input) {
    if (input.size() != inputs_) {
      throw std::invalid_argument(
          std::to_string(input.size()) + " values where the model takes " + std::to_string(inputs_));
    }
    void* memory = nullptr;
    check(LiteRtLockTensorBuffer(given_, &memory, kLiteRtTensorBufferLockModeWrite), "the input");
    std::copy(input.begin(), input.end(), static_cast<float*>(memory));
    check(LiteRtUnlockTensorBuffer(given_), "the input");

    check(LiteRtRunCompiledModel(compiled_, 0, 1, &given_, 1, &result_), "running the model");

    std::vector<float> output(outputs_);
    check(LiteRtLockTensorBuffer(result_, &memory, kLiteRtTensorBufferLockModeRead), "the output");
    std::copy_n(static_cast<const float*>(memory), outputs_, output.begin());
    check(LiteRtUnlockTensorBuffer(result_), "the output");
    return output;
  }

 private:
  void load(const std::string& path) {
    check(LiteRtCreateEnvironment(0, nullptr, &environment_), "LiteRT");
    check(LiteRtCreateModelFromFile(environment_, path.c_str(), &model_), path);
    check(LiteRtCreateOptions(&options_), "options");
    // The int8 kernels are XNNPACK's, on the processor; GPUs compute these models in float.
    check(LiteRtSetOptionsHardwareAccelerators(options_, kLiteRtHwAcceleratorCpu), "options");
    check(LiteRtCreateCompiledModel(environment_, model_, options_, &compiled_), path);

    LiteRtSignature signature;  // the model's, "serving_default": it belongs to it, as its tensors do
    LiteRtTensor input, output;
    check(LiteRtGetModelSignature(model_, 0, &signature), "the signature");
    check(LiteRtGetSignatureInputTensorByIndex(signature, 0, &input), "the input");
    check(LiteRtGetSignatureOutputTensorByIndex(signature, 0, &output), "the output");
    inputs_ = allocate(input, &given_);
    outputs_ = allocate(output, &result_);
  }

  // Memory for a tensor; returns how many values it has.
  size_t allocate(LiteRtTensor tensor, LiteRtTensorBuffer* buffer) {
    LiteRtRankedTensorType type;
    check(LiteRtGetRankedTensorType(tensor, &type), "the type of a tensor");
    if (type.element_type != kLiteRtElementTypeFloat32) throw std::runtime_error("a tensor that is not float32");
    size_t values = 1;
    for (unsigned axis = 0; axis < type.layout.rank; ++axis) {
      if (type.layout.dimensions[axis] < 1) {
        throw std::runtime_error("a size that varies: export with numbers, shapes=\"1, 224, 224, 3\"");
      }
      values *= type.layout.dimensions[axis];
    }
    check(LiteRtCreateManagedTensorBuffer(
              environment_, kLiteRtTensorBufferTypeHostMemory, &type, values * sizeof(float), buffer),
          "memory");
    return values;
  }

  static void check(LiteRtStatus status, const std::string& what) {
    if (status != 0) throw std::runtime_error(what + ": LiteRT's status " + std::to_string(status));
  }

  void release() {
    if (result_) LiteRtDestroyTensorBuffer(result_);
    if (given_) LiteRtDestroyTensorBuffer(given_);
    if (compiled_) LiteRtDestroyCompiledModel(compiled_);
    if (options_) LiteRtDestroyOptions(options_);
    if (model_) LiteRtDestroyModel(model_);
    if (environment_) LiteRtDestroyEnvironment(environment_);
  }

  LiteRtEnvironment environment_ = nullptr;
  LiteRtModel model_ = nullptr;
  LiteRtOptions options_ = nullptr;
  LiteRtCompiledModel compiled_ = nullptr;
  LiteRtTensorBuffer given_ = nullptr, result_ = nullptr;
  size_t inputs_ = 0, outputs_ = 0;
};
