// Convolutions of stride 1 and blocks of the ConvNet (convolution, instance normalisation, ReLU, 2x2
// average pooling), with their gradients, for CPUs: compiled.py says more. An image at a time, or
// some small ones, so that their maps stay in the cache from one part to the next.
//
// Images are (N, H, W, C), kernels (K, K, C, F), maps (H', W', F). The taps of a row of the kernel,
// (K, C), lie together in an image as well: a convolution is K products of these with pixels side by
// side, whose sums stay in registers.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Array = ffi::Buffer<ffi::F32>;
using Result = ffi::ResultBuffer<ffi::F32>;

#ifdef __AVX512F__
constexpr int kLanes = 16, kPixels = 8, kTaps = 12;
#else
constexpr int kLanes = 8, kPixels = 4, kTaps = 4;
#endif
constexpr float kEpsilon = 1e-5f;

typedef float Lanes __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline const Lanes& lanes(const float* place) { return *reinterpret_cast<const Lanes*>(place); }
inline Lanes& lanes(float* place) { return *reinterpret_cast<Lanes*>(place); }
inline Lanes positive(Lanes value) { return value > 0 ? value : Lanes{}; }

// Memory of a thread, which grows and is kept.
class Scratch {
 public:
  float* of(int64_t size) {
    if (size > size_) {
      memory_.reset(static_cast<float*>(std::aligned_alloc(64, (4 * size + 63) / 64 * 64)));
      size_ = size;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  std::unique_ptr<float[], Free> memory_;
  int64_t size_ = 0;
};

// The shape of a convolution of stride 1 whose inputs are padded.
struct Shape {
  int64_t height, width, channels, size, filters;  // of the output; of the input; of the kernel

  int64_t line() const { return (width + size - 1) * channels; }  // a row of the input
  int64_t inputs() const { return (height + size - 1) * line(); }
  int64_t pixels() const { return height * width; }
  int64_t taps() const { return size * size * channels; }
  int64_t vectors() const { return filters % (2 * kLanes) ? 1 : 2; }  // of filters that go together
};

// A kernel (K, K, C, F) with the filters that go together side by side: (F / f, K K C, f).
void pack(const Shape& shape, const float* kernel, float* packed) {
  const int64_t together = shape.vectors() * kLanes;
  for (int64_t first = 0; first < shape.filters; first += together)
    for (int64_t tap = 0; tap < shape.taps(); ++tap, packed += together)
      std::copy_n(kernel + tap * shape.filters + first, together, packed);
}

void unpack(const Shape& shape, const float* packed, float* kernel) {
  const int64_t together = shape.vectors() * kLanes;
  for (int64_t first = 0; first < shape.filters; first += together)
    for (int64_t tap = 0; tap < shape.taps(); ++tap, packed += together)
      std::copy_n(packed, together, kernel + tap * shape.filters + first);
}

// The kernel of the gradient of images: turned, and filters in place of channels.
void pack_turned(const Shape& shape, const float* kernel, float* packed) {
  const int64_t positions = shape.size * shape.size, channels = shape.channels;
  const int64_t together = (channels % (2 * kLanes) ? 1 : 2) * kLanes;
  for (int64_t first = 0; first < channels; first += together)
    for (int64_t position = positions - 1; position >= 0; --position)
      for (int64_t filter = 0; filter < shape.filters; ++filter)
        for (int64_t channel = first; channel < first + together; ++channel)
          *packed++ = kernel[(position * channels + channel) * shape.filters + filter];
}

// An image (H, W, C) with zeros around it.
void pad(const float* image, int64_t height, int64_t width, int64_t channels, int64_t padding,
         float* padded) {
  const int64_t line = (width + 2 * padding) * channels, side = padding * channels;
  std::fill_n(padded, padding * line, 0.0f);
  padded += padding * line;
  for (int64_t row = 0; row < height; ++row, padded += line, image += width * channels) {
    std::fill_n(padded, side, 0.0f);
    std::copy_n(image, width * channels, padded + side);
    std::fill_n(padded + line - side, side, 0.0f);
  }
  std::fill_n(padded, padding * line, 0.0f);
}

// Some pixels, `stride` apart in the inputs and `to_stride` in the outputs, for `vectors` vectors of
// filters.
template <int pixels, int vectors>
inline void convolve_pixels(const Shape& shape, const float* inputs, int64_t stride,
                            const float* packed, float* outputs, int64_t to_stride) {
  Lanes sums[pixels][vectors] = {};
  const int64_t taps = shape.size * shape.channels;
  for (int64_t row = 0; row < shape.size; ++row, inputs += shape.line())
    for (int64_t tap = 0; tap < taps; ++tap, packed += vectors * kLanes)
#pragma GCC unroll 16
      for (int pixel = 0; pixel < pixels; ++pixel)
#pragma GCC unroll 4
        for (int vector = 0; vector < vectors; ++vector)
          sums[pixel][vector] += lanes(packed + vector * kLanes) * inputs[pixel * stride + tap];
  for (int pixel = 0; pixel < pixels; ++pixel)
    for (int vector = 0; vector < vectors; ++vector)
      lanes(outputs + pixel * to_stride + vector * kLanes) = sums[pixel][vector];
}

// `count` of them.
template <int vectors>
void convolve_line(const Shape& shape, int64_t count, const float* inputs, int64_t stride,
                   const float* packed, float* outputs, int64_t to_stride) {
  int64_t done = 0;
  const auto all_of = [&]<int pixels>() {
    for (; done + pixels <= count; done += pixels)
      convolve_pixels<pixels, vectors>(shape, inputs + done * stride, stride, packed,
                                       outputs + done * to_stride, to_stride);
  };
  all_of.template operator()<kPixels>();
  all_of.template operator()<kPixels / 2>();
  all_of.template operator()<kPixels / 4>();
  all_of.template operator()<1>();
}

template <int vectors>
void convolve_with(const Shape& shape, int64_t number, const float* inputs, const float* packed,
                   float* outputs) {
  const int64_t channels = shape.channels, filters = shape.filters, width = shape.width;
  const int64_t of_map = shape.pixels() * filters;
  // Where rows are short the pixels of one place in all images.
  const bool across = number > width && width < kPixels;
  for (int64_t first = 0; first < filters; first += vectors * kLanes) {
    for (int64_t row = 0; row < shape.height; ++row) {
      const float* from = inputs + row * shape.line();
      float* to = outputs + row * width * filters + first;
      if (across)
        for (int64_t column = 0; column < width; ++column)
          convolve_line<vectors>(shape, number, from + column * channels, shape.inputs(), packed,
                                 to + column * filters, of_map);
      else
        for (int64_t n = 0; n < number; ++n)
          convolve_line<vectors>(shape, width, from + n * shape.inputs(), channels, packed,
                                 to + n * of_map, filters);
    }
    packed += shape.taps() * vectors * kLanes;
  }
}

// The maps of some padded images.
void convolve(const Shape& shape, int64_t number, const float* inputs, const float* packed,
              float* outputs) {
  auto with = shape.vectors() == 2 ? convolve_with<2> : convolve_with<1>;
  with(shape, number, inputs, packed, outputs);
}

// The gradients of maps of some images, whose rows may be longer than the maps'.
struct Gradient {
  const float* values;
  int64_t number, line, of_image;
};

// Adds the gradient of some taps, side by side in each of `rows` rows of the kernel, for `vectors`
// vectors of filters.
template <int rows, int taps, int vectors>
inline void add_taps(const Shape& shape, const float* inputs, const Gradient& gradient,
                     float* sums_of_row) {
  Lanes sums[rows][taps][vectors];
  const int64_t of_row = shape.size * shape.channels * vectors * kLanes;
  for (int row = 0; row < rows; ++row)
    for (int tap = 0; tap < taps; ++tap)
      for (int vector = 0; vector < vectors; ++vector)
        sums[row][tap][vector] = lanes(sums_of_row + row * of_row + (tap * vectors + vector) * kLanes);
  for (int64_t y = 0; y < gradient.number * shape.height; ++y) {
    const int64_t image = y / shape.height, row = y % shape.height;
    const float* pixel = inputs + image * shape.inputs() + row * shape.line();
    const float* of_pixel = gradient.values + image * gradient.of_image + row * gradient.line;
    for (int64_t x = 0; x < shape.width; ++x, pixel += shape.channels, of_pixel += shape.filters)
#pragma GCC unroll 4
      for (int vector = 0; vector < vectors; ++vector) {
        const Lanes passed = lanes(of_pixel + vector * kLanes);
#pragma GCC unroll 4
        for (int row = 0; row < rows; ++row)
#pragma GCC unroll 16
          for (int tap = 0; tap < taps; ++tap)
            sums[row][tap][vector] += passed * pixel[row * shape.line() + tap];
      }
  }
  for (int row = 0; row < rows; ++row)
    for (int tap = 0; tap < taps; ++tap)
      for (int vector = 0; vector < vectors; ++vector)
        lanes(sums_of_row + row * of_row + (tap * vectors + vector) * kLanes) = sums[row][tap][vector];
}

template <int vectors>
void add_kernel_gradient_with(const Shape& shape, const float* inputs, Gradient gradient,
                              float* packed) {
  const int64_t taps = shape.size * shape.channels, together = vectors * kLanes;
  for (int64_t first = 0; first < shape.filters; first += together, gradient.values += together) {
    if (shape.size == 3 && taps == 3) {  // a grey image: all nine at once
      add_taps<3, 3, vectors>(shape, inputs, gradient, packed);
      packed += shape.taps() * together;
      continue;
    }
    for (int64_t row = 0; row < shape.size; ++row) {
      const float* from = inputs + row * shape.line();
      int64_t tap = 0;
      for (; tap + kTaps <= taps; tap += kTaps, packed += kTaps * together)
        add_taps<1, kTaps, vectors>(shape, from + tap, gradient, packed);
      for (; tap + 3 <= taps; tap += 3, packed += 3 * together)
        add_taps<1, 3, vectors>(shape, from + tap, gradient, packed);
      for (; tap < taps; ++tap, packed += together)
        add_taps<1, 1, vectors>(shape, from + tap, gradient, packed);
    }
  }
}

void add_kernel_gradient(const Shape& shape, const float* inputs, const Gradient& gradient,
                         float* packed) {
  auto add = shape.vectors() == 2 ? add_kernel_gradient_with<2> : add_kernel_gradient_with<1>;
  add(shape, inputs, gradient, packed);
}

// Statistics of a map over its pixels.
void statistics(const Shape& shape, const float* map, float* mean, float* inverse) {
  const int64_t pixels = shape.pixels(), filters = shape.filters;
  for (int64_t filter = 0; filter < filters; filter += kLanes) {
    Lanes sums[2] = {}, squares[2] = {};
    for (int64_t pixel = 0; pixel < pixels; pixel += 2)  // their number is even
      for (int part = 0; part < 2; ++part) {
        const Lanes value = lanes(map + (pixel + part) * filters + filter);
        sums[part] += value;
        squares[part] += value * value;
      }
    const Lanes average = (sums[0] + sums[1]) / static_cast<float>(pixels);
    const Lanes square = (squares[0] + squares[1]) / static_cast<float>(pixels);
    const Lanes variance = positive(square - average * average) + kEpsilon;
    lanes(mean + filter) = average;
    for (int lane = 0; lane < kLanes; ++lane) inverse[filter + lane] = 1 / std::sqrt(variance[lane]);
  }
}

// The pooled map of a normalised one.
void pool_map(const Shape& shape, const float* map, const float* mean, const float* inverse,
              const float* scale, const float* bias, float* pooled) {
  const int64_t filters = shape.filters, line = shape.width * filters;
  for (int64_t filter = 0; filter < filters; filter += kLanes) {
    const Lanes slope = lanes(inverse + filter) * lanes(scale + filter);
    const Lanes offset = lanes(bias + filter) - lanes(mean + filter) * slope;
    float* to = pooled + filter;
    for (int64_t row = 0; row < shape.height; row += 2)
      for (int64_t column = 0; column < shape.width; column += 2, to += filters) {
        const float* window = map + row * line + column * filters + filter;
        Lanes sum = positive(lanes(window) * slope + offset);
        sum += positive(lanes(window + filters) * slope + offset);
        sum += positive(lanes(window + line) * slope + offset);
        sum += positive(lanes(window + line + filters) * slope + offset);
        lanes(to) = sum * 0.25f;
      }
  }
}

// The gradient of a map from that of its pooled one, to rows that are `line` long, and adds those of
// scale and bias.
void unpool_map(const Shape& shape, const float* map, const float* mean, const float* inverse,
                const float* scale, const float* bias, const float* pooled, int64_t line,
                float* gradient, float* to_scale, float* to_bias) {
  const int64_t filters = shape.filters, from_line = shape.width * filters;
  for (int64_t filter = 0; filter < filters; filter += kLanes) {
    const Lanes average = lanes(mean + filter), deviation = lanes(inverse + filter);
    const Lanes slope = deviation * lanes(scale + filter);
    const Lanes offset = lanes(bias + filter) - average * slope;
    Lanes total{}, product{};
    const float* of_window = pooled + filter;
    for (int64_t row = 0; row < shape.height; row += 2)
      for (int64_t column = 0; column < shape.width; column += 2, of_window += filters) {
        const float* window = map + row * from_line + column * filters + filter;
        float* to = gradient + row * line + column * filters + filter;
        const Lanes share = lanes(of_window) * 0.25f;
        for (int corner = 0; corner < 4; ++corner) {
          const int64_t right = corner % 2 * filters;
          const Lanes value = lanes(window + corner / 2 * from_line + right);
          const Lanes passed = value * slope + offset > 0 ? share : Lanes{};
          lanes(to + corner / 2 * line + right) = passed;
          total += passed;
          product += passed * value;
        }
      }
    product = (product - average * total) * deviation;  // with the normalised map
    lanes(to_scale + filter) += product;
    lanes(to_bias + filter) += total;
    const float pixels = shape.pixels();
    // slope (passed - (total + (value - average) deviation product) / pixels)
    const Lanes by_value = -slope * deviation * product / pixels;
    const Lanes constant = -slope * total / pixels - average * by_value;
    for (int64_t row = 0; row < shape.height; ++row) {
      const float* from = map + row * from_line + filter;
      float* to = gradient + row * line + filter;
      for (int64_t column = 0; column < shape.width; ++column, from += filters, to += filters)
        lanes(to) = lanes(to) * slope + lanes(from) * by_value + constant;
    }
  }
}

// Calls work(0) to work(count - 1), in as many threads as there are. Who calls this does its share and
// waits for nothing that has not begun, so that a pool whose threads are all at work delays nobody.
template <typename Work>
void for_each(ffi::ThreadPool& pool, bool threads, int64_t count, const Work& work) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all_done;
  };
  auto shared = std::make_shared<Shared>();
  auto run = [shared, count, &work] {
    for (int64_t index; (index = shared->next++) < count;) {
      work(index);
      if (++shared->done == count) {
        std::lock_guard<std::mutex> lock(shared->mutex);
        shared->all_done.notify_one();
      }
    }
  };
  const int64_t helpers = threads ? std::min<int64_t>(pool.num_threads(), count) - 1 : 0;
  for (int64_t helper = 0; helper < helpers; ++helper) pool.Schedule([run] { run(); });
  run();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->all_done.wait(lock, [&] { return shared->done == count; });
}

// The images of a convolution and how they are divided.
struct Call {
  Call(const Array& images, const Array& kernel, int64_t padding) : padding(padding) {
    const auto image = images.dimensions(), of_kernel = kernel.dimensions();
    const int64_t size = of_kernel[0], more = 2 * padding - size + 1;
    number = image[0], height = image[1], width = image[2];
    shape = {height + more, width + more, image[3], size, of_kernel[3]};
    turned = {height, width, shape.filters, size, shape.channels};
    of_image = height * width * shape.channels;
    of_map = shape.pixels() * shape.filters;
    weights = shape.taps() * shape.filters;
    // So many images at a time that a kernel is worth its way from memory.
    together = std::clamp<int64_t>(64 / shape.pixels(), 1, std::max<int64_t>(number, 1));
    parts = (number + together - 1) / together;
    // Sums over images do not depend on the number of threads: there are as many of them as here.
    groups = std::clamp<int64_t>(std::min(parts / 8, (int64_t{1} << 22) / weights), 1, 16);
    // And so many of these as are work enough for a thread.
    parts_at_once = 1 + (int64_t{1} << 19) / (together * weights * shape.pixels());
  }

  // Calls work(first, count) for some images at a time, from `part` to `last`.
  template <typename Work>
  void for_parts(int64_t part, int64_t last, const Work& work) const {
    for (; part < last; ++part)
      work(part * together, std::min(together, number - part * together));
  }

  template <typename Work>
  void for_images(ffi::ThreadPool& pool, bool threads, const Work& work) const {
    for_each(pool, threads, (parts + parts_at_once - 1) / parts_at_once, [&](int64_t index) {
      for_parts(index * parts_at_once, std::min(parts, (index + 1) * parts_at_once), work);
    });
  }

  // Calls work(first, count, sums) for the images of each group, adds the sums of groups, of `size`.
  template <typename Work>
  void sum_images(ffi::ThreadPool& pool, bool threads, int64_t size, const Work& work,
                  float* total) const {
    std::vector<float> sums(groups * size);
    for_each(pool, threads, groups, [&](int64_t group) {
      float* own = sums.data() + group * size;
      for_parts(group * parts / groups, (group + 1) * parts / groups,
                [&](int64_t first, int64_t count) { work(first, count, own); });
    });
    std::copy_n(sums.data(), size, total);
    for (int64_t group = 1; group < groups; ++group)
      for (int64_t place = 0; place < size; ++place) total[place] += sums[group * size + place];
  }

  // Images with their zeros around them, in memory of this thread.
  float* padded(const Array& images, int64_t first, int64_t count) const {
    thread_local Scratch scratch;
    float* inputs = scratch.of(together * shape.inputs());
    for (int64_t n = 0; n < count; ++n)
      pad(images.typed_data() + (first + n) * of_image, height, width, shape.channels, padding,
          inputs + n * shape.inputs());
    return inputs;
  }

  Shape shape, turned;  // `turned`: of the gradient of images
  int64_t padding, number, height, width, of_image, of_map, weights;
  int64_t together, parts, groups, parts_at_once;
};

ffi::Error convolution(ffi::ThreadPool pool, int64_t padding, bool threads, Array images,
                       Array kernel, Result maps) {
  const Call call(images, kernel, padding);
  std::vector<float> packed(call.weights);
  pack(call.shape, kernel.typed_data(), packed.data());
  call.for_images(pool, threads, [&](int64_t first, int64_t count) {
    convolve(call.shape, count, call.padded(images, first, count), packed.data(),
             maps->typed_data() + first * call.of_map);
  });
  return ffi::Error::Success();
}

// The gradients of the kernel and, where `to_images` is not empty, of the images.
ffi::Error convolution_gradient(ffi::ThreadPool pool, int64_t padding, bool threads, Array images,
                                Array kernel, Array gradient, Result to_images, Result to_kernel) {
  const Call call(images, kernel, padding);
  const Shape &shape = call.shape, &turned = call.turned;
  const bool wanted = to_images->element_count() > 0;
  std::vector<float> sums(call.weights), packed(call.weights);
  if (wanted) pack_turned(shape, kernel.typed_data(), packed.data());
  const auto work = [&](int64_t first, int64_t count, float* sums) {
    const float* passed = gradient.typed_data() + first * call.of_map;
    const Gradient of_maps{passed, count, shape.width * shape.filters, call.of_map};
    add_kernel_gradient(shape, call.padded(images, first, count), of_maps, sums);
    if (!wanted) return;
    thread_local Scratch scratch;
    float* padded = scratch.of(call.together * turned.inputs());
    for (int64_t n = 0; n < count; ++n)
      pad(passed + n * call.of_map, shape.height, shape.width, shape.filters,
          shape.size - 1 - padding, padded + n * turned.inputs());
    convolve(turned, count, padded, packed.data(), to_images->typed_data() + first * call.of_image);
  };
  call.sum_images(pool, threads, call.weights, work, sums.data());
  unpack(shape, sums.data(), to_kernel->typed_data());
  return ffi::Error::Success();
}

// The pooled maps; where `maps` is not empty also these, their means and 1 / standard deviations.
ffi::Error block(ffi::ThreadPool pool, int64_t padding, bool threads, Array images, Array kernel,
                 Array scale, Array bias, Result pooled, Result maps, Result mean, Result inverse) {
  const Call call(images, kernel, padding);
  const int64_t filters = call.shape.filters;
  std::vector<float> packed(call.weights);
  pack(call.shape, kernel.typed_data(), packed.data());
  const bool keep = maps->element_count() > 0;
  call.for_images(pool, threads, [&](int64_t first, int64_t count) {
    thread_local Scratch scratch;
    float* own = scratch.of(call.together * (call.of_map + 2 * filters));
    float* map = keep ? maps->typed_data() + first * call.of_map : own;
    float* means = keep ? mean->typed_data() + first * filters : own + count * call.of_map;
    float* inverses = keep ? inverse->typed_data() + first * filters : means + count * filters;
    convolve(call.shape, count, call.padded(images, first, count), packed.data(), map);
    for (int64_t n = 0; n < count; ++n, map += call.of_map, means += filters, inverses += filters) {
      statistics(call.shape, map, means, inverses);
      pool_map(call.shape, map, means, inverses, scale.typed_data(), bias.typed_data(),
               pooled->typed_data() + (first + n) * call.of_map / 4);
    }
  });
  return ffi::Error::Success();
}

// The gradients of the kernel, of scale and bias and, where `to_images` is not empty, of the images.
ffi::Error block_gradient(ffi::ThreadPool pool, int64_t padding, bool threads, Array images,
                          Array kernel, Array scale, Array bias, Array maps, Array mean,
                          Array inverse, Array gradient, Result to_images, Result to_kernel,
                          Result to_scale, Result to_bias) {
  const Call call(images, kernel, padding);
  const Shape& shape = call.shape;
  const int64_t filters = shape.filters;
  const bool wanted = to_images->element_count() > 0;
  const int64_t around = wanted ? shape.size - 1 - padding : 0;
  const int64_t line = (shape.width + 2 * around) * filters;
  const int64_t of_gradient = (shape.height + 2 * around) * line;
  std::vector<float> sums(call.weights + 2 * filters), packed(call.weights);
  if (wanted) pack_turned(shape, kernel.typed_data(), packed.data());
  const auto work = [&](int64_t first, int64_t count, float* sums) {
    thread_local Scratch scratch;
    float* padded = scratch.of(call.together * of_gradient);
    float* passed = padded + around * (line + filters);
    if (wanted) std::fill_n(padded, count * of_gradient, 0.0f);
    for (int64_t n = 0; n < count; ++n)
      unpool_map(shape, maps.typed_data() + (first + n) * call.of_map,
                 mean.typed_data() + (first + n) * filters,
                 inverse.typed_data() + (first + n) * filters, scale.typed_data(),
                 bias.typed_data(), gradient.typed_data() + (first + n) * call.of_map / 4, line,
                 passed + n * of_gradient, sums + call.weights, sums + call.weights + filters);
    const Gradient of_maps{passed, count, line, of_gradient};
    add_kernel_gradient(shape, call.padded(images, first, count), of_maps, sums);
    if (wanted)
      convolve(call.turned, count, padded, packed.data(),
               to_images->typed_data() + first * call.of_image);
  };
  call.sum_images(pool, threads, call.weights + 2 * filters, work, sums.data());
  unpack(shape, sums.data(), to_kernel->typed_data());
  std::copy_n(sums.data() + call.weights, filters, to_scale->typed_data());
  std::copy_n(sums.data() + call.weights + filters, filters, to_bias->typed_data());
  return ffi::Error::Success();
}

auto bind() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<int64_t>("padding").Attr<bool>("threads");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(evojax_suite_convolution, convolution,
                              bind().Arg<Array>().Arg<Array>().Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    evojax_suite_convolution_gradient, convolution_gradient,
    bind().Arg<Array>().Arg<Array>().Arg<Array>().Ret<Array>().Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    evojax_suite_block, block,
    bind().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>()
        .Ret<Array>().Ret<Array>().Ret<Array>().Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    evojax_suite_block_gradient, block_gradient,
    bind().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>()
        .Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>()
        .Ret<Array>().Ret<Array>().Ret<Array>().Ret<Array>());
