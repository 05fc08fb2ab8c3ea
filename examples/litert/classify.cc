// Runs a .tflite file on one input: classify MODEL INPUT OUTPUT, the last two float32 in row-major order.
//
//   folder=$(python -c 'import ai_edge_litert, pathlib; print(pathlib.Path(ai_edge_litert.__file__).parent)')
//   g++ -std=c++17 -O2 classify.cc "$folder/libLiteRt.so" -Wl,-rpath,"$folder" -o classify
//   ./classify model.tflite image.f32 logits.f32
#include <iostream>

#include "../values.h"
#include "classifier.h"

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
