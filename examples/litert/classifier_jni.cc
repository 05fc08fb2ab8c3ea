// The native half of Classifier.java; on Android a library of the application's CMakeLists.txt.
//
//   java=$(dirname "$(dirname "$(readlink -f "$(command -v javac)")")")
//   g++ -std=c++17 -O2 -shared -fPIC -I"$java/include" -I"$java/include/linux" classifier_jni.cc \
//     "$folder/libLiteRt.so" -Wl,-rpath,"$folder" -o libclassifier.so      # folder: as in classify.cc
//   javac Classifier.java && java -Djava.library.path=. -cp . Classifier model.tflite image.f32 logits.f32
#include <jni.h>

#include <cstdint>
#include <exception>

#include "classifier.h"

namespace {

// What a C++ error becomes: no exception of C++ may pass through Java's frames.
void raise(JNIEnv* java, const std::exception& error) {
  java->ThrowNew(java->FindClass("java/lang/IllegalArgumentException"), error.what());
}

Classifier* classifier_of(jlong handle) { return reinterpret_cast<Classifier*>(static_cast<intptr_t>(handle)); }

}  // namespace

extern "C" {

JNIEXPORT jlong JNICALL Java_Classifier_load(JNIEnv* java, jclass, jstring path) {
  const char* name = java->GetStringUTFChars(path, nullptr);
  Classifier* classifier = nullptr;
  try {
    classifier = new Classifier(name);
  } catch (const std::exception& error) {
    raise(java, error);
  }
  java->ReleaseStringUTFChars(path, name);
  return static_cast<jlong>(reinterpret_cast<intptr_t>(classifier));
}

JNIEXPORT jfloatArray JNICALL Java_Classifier_run(JNIEnv* java, jclass, jlong handle, jfloatArray input) {
  try {
    std::vector<float> values(java->GetArrayLength(input));
    java->GetFloatArrayRegion(input, 0, values.size(), values.data());
    const std::vector<float> output = (*classifier_of(handle))(values);
    jfloatArray result = java->NewFloatArray(output.size());
    if (result) java->SetFloatArrayRegion(result, 0, output.size(), output.data());
    return result;
  } catch (const std::exception& error) {
    raise(java, error);
    return nullptr;
  }
}

JNIEXPORT void JNICALL Java_Classifier_release(JNIEnv*, jclass, jlong handle) {
  delete classifier_of(handle);
}

}  // extern "C"
