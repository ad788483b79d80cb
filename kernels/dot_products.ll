; The fixed part of dot_products.py, which replaces the words in capitals and adds @dot and the @tile_ROWS.

declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
declare <16 x i32> @llvm.umax.v16i32(<16 x i32>, <16 x i32>)
declare i32 @llvm.vector.reduce.umax.v16i32(<16 x i32>)
declare i32 @llvm.vector.reduce.add.v16i32(<16 x i32>)
DECLARE_MASKED

define internal <16 x i32> @four_bytes(ptr %at) alwaysinline {
  %one = load i32, ptr %at, align 4
  %first = insertelement <16 x i32> poison, i32 %one, i64 0
  %all = shufflevector <16 x i32> %first, <16 x i32> poison, <16 x i32> zeroinitializer
  ret <16 x i32> %all
}
define internal <16 x float> @spread(ptr %base, i64 %index) alwaysinline {
  %at = getelementptr float, ptr %base, i64 %index
  %one = load float, ptr %at, align 4
  %first = insertelement <16 x float> poison, float %one, i64 0
  %all = shufflevector <16 x float> %first, <16 x float> poison, <16 x i32> zeroinitializer
  ret <16 x float> %all
}
define internal <16 x float> @activations(ptr %at) alwaysinline {
  %given = load <16 x X_TYPE>, ptr %at, align X_BYTES
  %v = EXTEND_X
  ret <16 x float> %v
}
define internal <16 x float> @scales_at(ptr %base, i64 %index) alwaysinline {
  %at = getelementptr <16 x S_TYPE>, ptr %base, i64 %index
  %given = load <16 x S_TYPE>, ptr %at, align S_BYTES
  %v = EXTEND_S
  ret <16 x float> %v
}
define internal <16 x float> @bias_values(<16 x B_TYPE> %given) alwaysinline {
  %v = EXTEND_B
  ret <16 x float> %v
}

; Activations to two signed bytes each, with a step and a sum for every chunk.
; The largest magnitude is found on the bits, where infinity and then NaN come after all numbers: the step is
; then not finite either, and so is what is multiplied with it. Adding 1.5 * 2**23 rounds to an integer and
; leaves it in the low bits. Below 2**-100 a chunk is zero: its inverse step would overflow.
define internal void @prepare(ptr %a) {
entry:
ARGS
  %chunk = shl i64 %octets, 3
  %channels = mul i64 %chunks, %chunk
  %all = mul i64 %rows, %chunks
  br label %next
next:
  %c = phi i64 [0, %entry], [%c1, %done]
  %row = udiv i64 %c, %chunks
  %column = urem i64 %c, %chunks
  %from = mul i64 %c, %chunk
  %row2 = shl i64 %row, 1
  %skip = mul i64 %row2, %channels
  %in = mul i64 %column, %chunk
  %to = add i64 %skip, %in
  %high = getelementptr i8, ptr %digits, i64 %to
  %low = getelementptr i8, ptr %high, i64 %channels
  br label %measure
measure:
  %i = phi i64 [0, %next], [%i1, %measure]
  %top = phi <16 x i32> [zeroinitializer, %next], [%top1, %measure]
  %e = add i64 %from, %i
  %p = getelementptr X_TYPE, ptr %x, i64 %e
  %v = call <16 x float> @activations(ptr %p)
  %bits = bitcast <16 x float> %v to <16 x i32>
  %size = and <16 x i32> %bits, splat (i32 2147483647)
  %top1 = call <16 x i32> @llvm.umax.v16i32(<16 x i32> %top, <16 x i32> %size)
  %i1 = add i64 %i, 16
  %more = icmp ult i64 %i1, %chunk
  br i1 %more, label %measure, label %choose
choose:
  %most = call i32 @llvm.vector.reduce.umax.v16i32(<16 x i32> %top1)
  %largest = bitcast i32 %most to float
  %small = fcmp olt float %largest, TINY
  %step = fdiv float %largest, TOP
  %inverse = fdiv float TOP, %largest
  %step0 = select i1 %small, float 0.0, float %step
  %inverse0 = select i1 %small, float 0.0, float %inverse
  %first = insertelement <16 x float> poison, float %inverse0, i64 0
  %by = shufflevector <16 x float> %first, <16 x float> poison, <16 x i32> zeroinitializer
  %ps = getelementptr float, ptr %steps, i64 %c
  store float %step0, ptr %ps, align 4
  br label %split
split:
  %j = phi i64 [0, %choose], [%j1, %split]
  %sum = phi <16 x i32> [zeroinitializer, %choose], [%sum1, %split]
  %f = add i64 %from, %j
  %q = getelementptr X_TYPE, ptr %x, i64 %f
  %w = call <16 x float> @activations(ptr %q)
  %scaled = fmul <16 x float> %w, %by
  %rounded = fadd <16 x float> %scaled, splat (float MAGIC)
  %pattern = bitcast <16 x float> %rounded to <16 x i32>
  %n = sub <16 x i32> %pattern, splat (i32 MAGIC_BITS)
  %sum1 = add <16 x i32> %sum, %n
  %n128 = add <16 x i32> %n, splat (i32 128)
  %h = ashr <16 x i32> %n128, splat (i32 8)
  %h256 = shl <16 x i32> %h, splat (i32 8)
  %l = sub <16 x i32> %n, %h256
  %h8 = trunc <16 x i32> %h to <16 x i8>
  %l8 = trunc <16 x i32> %l to <16 x i8>
  %ph = getelementptr i8, ptr %high, i64 %j
  %pl = getelementptr i8, ptr %low, i64 %j
  store <16 x i8> %h8, ptr %ph, align 16
  store <16 x i8> %l8, ptr %pl, align 16
  %j1 = add i64 %j, 16
  %again = icmp ult i64 %j1, %chunk
  br i1 %again, label %split, label %done
done:
  %total = call i32 @llvm.vector.reduce.add.v16i32(<16 x i32> %sum1)
  %totalf = sitofp i32 %total to float
  %pt = getelementptr float, ptr %sums, i64 %c
  store float %totalf, ptr %pt, align 4
  %c1 = add i64 %c, 1
  %left = icmp ult i64 %c1, %all
  br i1 %left, label %next, label %end
end:
  ret void
}

; Threads take blocks, each the whole of its share; within a block, tiles of rows one after the other.
define internal void @team(ptr %a) {
entry:
ARGS
  %t32 = call i32 %thread()
  %n32 = call i32 %team()
  %t = zext i32 %t32 to i64
  %n = zext i32 %n32 to i64
  %t1 = add i64 %t, 1
  %f0 = mul i64 %blocks, %t
  %f1 = mul i64 %blocks, %t1
  %b0 = udiv i64 %f0, %n
  %b1 = udiv i64 %f1, %n
  %any = icmp ult i64 %b0, %b1
  br i1 %any, label %block, label %end
block:
  %b = phi i64 [%b0, %entry], [%bn, %blockend]
  br label %ask
ask:
  %row = phi i64 [0, %block], [%rowt, %whole]
  %rowt = add i64 %row, TILE
  %fits = icmp ule i64 %rowt, %rows
  br i1 %fits, label %whole, label %rest
whole:
  call void @tile_TILE(ptr %a, i64 %b, i64 %row)
  br label %ask
rest:
  %left = sub i64 %rows, %row
  switch i64 %left, label %blockend [ CASES ]
REST
blockend:
  %bn = add i64 %b, 1
  %more = icmp ult i64 %bn, %b1
  br i1 %more, label %block, label %end
end:
  ret void
}
define void @linear(ptr %a) {
entry:
ARGS
  call void @prepare(ptr %a)
  %count = trunc i64 %threads to i32
  %alone = icmp eq i32 %count, 1
  br i1 %alone, label %one, label %many
one:
  call void @team(ptr %a)
  ret void
many:
  call void %parallel(ptr @team, ptr %a, i32 %count, i32 0)
  ret void
}

; Lines with _M are there once for each row, with its NUMBER in the tile.
; ---- tile ----

define internal void @tile_ROWS(ptr %a, i64 %block, i64 %row) {
entry:
ARGS
  %all_octets = mul i64 %chunks, %octets
  %channels = shl i64 %all_octets, 3
  %w_skip = mul i64 %block, %all_octets
  %w_block = getelementptr <16 x i32>, ptr %codes, i64 %w_skip
  %s_block = mul i64 %block, %chunks
  %n = shl i64 %block, 4
  %row_M = add i64 %row, NUMBER
  %row2_M = shl i64 %row_M, 1
  %x_skip_M = mul i64 %row2_M, %channels
  %x_h_M = getelementptr i8, ptr %digits, i64 %x_skip_M
  %x_l_M = getelementptr i8, ptr %x_h_M, i64 %channels
  %c_row_M = mul i64 %row_M, %chunks
  br label %chunk
chunk:
  %c = phi i64 [0, %entry], [%c1, %chunkend]
  %y_M = phi <16 x float> [zeroinitializer, %entry], [%y1_M, %chunkend]
  %first = mul i64 %c, %octets
  br label %step
step:
  %s = phi i64 [0, %chunk], [%s1, %step]
  %h0_M = phi <16 x i32> [zeroinitializer, %chunk], [%h4_M, %step]
  %l0_M = phi <16 x i32> [zeroinitializer, %chunk], [%l4_M, %step]
  %o = add i64 %first, %s
  ; channels 0 to 7 of this step
  %o0 = add i64 %o, 0
  %w_at0 = getelementptr <16 x i32>, ptr %w_block, i64 %o0
  %w0 = load <16 x i32>, ptr %w_at0, align 4
  %ahead0 = getelementptr i8, ptr %w_at0, i64 AHEAD
  call void @llvm.prefetch.p0(ptr %ahead0, i32 0, i32 2, i32 1)
  %shifted0 = lshr <16 x i32> %w0, splat (i32 4)
  %q0 = and <16 x i32> %w0, splat (i32 252645135)
  %xi0 = shl i64 %o0, 3
  %h_at0_M = getelementptr i8, ptr %x_h_M, i64 %xi0
  %h_x0_M = call <16 x i32> @four_bytes(ptr %h_at0_M)
  %h1_M = call <16 x i32> @dot(<16 x i32> %h0_M, <16 x i32> %q0, <16 x i32> %h_x0_M)
  %l_at0_M = getelementptr i8, ptr %x_l_M, i64 %xi0
  %l_x0_M = call <16 x i32> @four_bytes(ptr %l_at0_M)
  %l1_M = call <16 x i32> @dot(<16 x i32> %l0_M, <16 x i32> %q0, <16 x i32> %l_x0_M)
  %q1 = and <16 x i32> %shifted0, splat (i32 252645135)
  %xi1 = add i64 %xi0, 4
  %h_at1_M = getelementptr i8, ptr %x_h_M, i64 %xi1
  %h_x1_M = call <16 x i32> @four_bytes(ptr %h_at1_M)
  %h2_M = call <16 x i32> @dot(<16 x i32> %h1_M, <16 x i32> %q1, <16 x i32> %h_x1_M)
  %l_at1_M = getelementptr i8, ptr %x_l_M, i64 %xi1
  %l_x1_M = call <16 x i32> @four_bytes(ptr %l_at1_M)
  %l2_M = call <16 x i32> @dot(<16 x i32> %l1_M, <16 x i32> %q1, <16 x i32> %l_x1_M)
  ; channels 8 to 15 of this step
  %o1 = add i64 %o, 1
  %w_at1 = getelementptr <16 x i32>, ptr %w_block, i64 %o1
  %w1 = load <16 x i32>, ptr %w_at1, align 4
  %ahead1 = getelementptr i8, ptr %w_at1, i64 AHEAD
  call void @llvm.prefetch.p0(ptr %ahead1, i32 0, i32 2, i32 1)
  %shifted1 = lshr <16 x i32> %w1, splat (i32 4)
  %q2 = and <16 x i32> %w1, splat (i32 252645135)
  %xi2 = shl i64 %o1, 3
  %h_at2_M = getelementptr i8, ptr %x_h_M, i64 %xi2
  %h_x2_M = call <16 x i32> @four_bytes(ptr %h_at2_M)
  %h3_M = call <16 x i32> @dot(<16 x i32> %h2_M, <16 x i32> %q2, <16 x i32> %h_x2_M)
  %l_at2_M = getelementptr i8, ptr %x_l_M, i64 %xi2
  %l_x2_M = call <16 x i32> @four_bytes(ptr %l_at2_M)
  %l3_M = call <16 x i32> @dot(<16 x i32> %l2_M, <16 x i32> %q2, <16 x i32> %l_x2_M)
  %q3 = and <16 x i32> %shifted1, splat (i32 252645135)
  %xi3 = add i64 %xi2, 4
  %h_at3_M = getelementptr i8, ptr %x_h_M, i64 %xi3
  %h_x3_M = call <16 x i32> @four_bytes(ptr %h_at3_M)
  %h4_M = call <16 x i32> @dot(<16 x i32> %h3_M, <16 x i32> %q3, <16 x i32> %h_x3_M)
  %l_at3_M = getelementptr i8, ptr %x_l_M, i64 %xi3
  %l_x3_M = call <16 x i32> @four_bytes(ptr %l_at3_M)
  %l4_M = call <16 x i32> @dot(<16 x i32> %l3_M, <16 x i32> %q3, <16 x i32> %l_x3_M)
  %s1 = add i64 %s, 2
  %more = icmp ult i64 %s1, %octets
  br i1 %more, label %step, label %chunkend
chunkend:
  %si = add i64 %s_block, %c
  %scale = call <16 x float> @scales_at(ptr %scales, i64 %si)
  %z_at = getelementptr <16 x i8>, ptr %zeros, i64 %si
  %z8 = load <16 x i8>, ptr %z_at, align 1
  %z = uitofp <16 x i8> %z8 to <16 x float>
  %minus_z = fneg <16 x float> %z
  %ci_M = add i64 %c_row_M, %c
  %hf_M = sitofp <16 x i32> %h4_M to <16 x float>
  %lf_M = sitofp <16 x i32> %l4_M to <16 x float>
  %q_M = call <16 x float> @llvm.fma.v16f32(<16 x float> %hf_M, <16 x float> splat (float 256.0), <16 x float> %lf_M)
  %sum_M = call <16 x float> @spread(ptr %sums, i64 %ci_M)
  %step_M = call <16 x float> @spread(ptr %steps, i64 %ci_M)
  %d_M = call <16 x float> @llvm.fma.v16f32(<16 x float> %minus_z, <16 x float> %sum_M, <16 x float> %q_M)
  %by_M = fmul <16 x float> %scale, %step_M
  %y1_M = call <16 x float> @llvm.fma.v16f32(<16 x float> %by_M, <16 x float> %d_M, <16 x float> %y_M)
  %c1 = add i64 %c, 1
  %go = icmp ult i64 %c1, %chunks
  br i1 %go, label %chunk, label %end
end:
  ; The last block may be wider than what is left of the output; without a bias nothing of it is read.
  %left = sub i64 %outputs, %n
  %left32 = trunc i64 %left to i32
  %left1 = insertelement <16 x i32> poison, i32 %left32, i64 0
  %left16 = shufflevector <16 x i32> %left1, <16 x i32> poison, <16 x i32> zeroinitializer
  %inside = icmp slt <16 x i32> BOTH, %left16
  %biased = icmp ne ptr %bias, null
  %reads = select i1 %biased, <16 x i1> %inside, <16 x i1> zeroinitializer
  %bias_at = getelementptr B_TYPE, ptr %bias, i64 %n
  %bias_bits = call <16 x B_BITS> @llvm.masked.load.v16B_BITS.p0(ptr %bias_at, i32 B_BYTES, <16 x i1> %reads, <16 x B_BITS> zeroinitializer)
  %bias_given = bitcast <16 x B_BITS> %bias_bits to <16 x B_TYPE>
  %bias_v = call <16 x float> @bias_values(<16 x B_TYPE> %bias_given)
  %out_skip_M = mul i64 %row_M, %outputs
  %out_i_M = add i64 %out_skip_M, %n
  %out_M = getelementptr X_TYPE, ptr %out, i64 %out_i_M
  %result_M = fadd <16 x float> %y1_M, %bias_v
  %bits_M = call <16 x X_BITS> @rounded(<16 x float> %result_M)
  call void @llvm.masked.store.v16X_BITS.p0(<16 x X_BITS> %bits_M, ptr %out_M, i32 X_BYTES, <16 x i1> %inside)
  ret void
}
