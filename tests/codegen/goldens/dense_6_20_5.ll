target datalayout = "e-m:e-p270:32:32-p271:32:32-p272:64:64-i64:64-i128:128-f80:128-n8:16:32:64-S128"
target triple = "x86_64-unknown-linux-gnu"

define hidden i32 @dense(ptr %frame, ptr noalias %arg0, ptr noalias %arg1, ptr noalias %arg2) #0 {
entry:
  %buf11 = alloca [16 x float], align 32
  br label %loop1
loop1:
  %i3 = phi i64 [ 0, %entry ], [ %t100, %done5 ]
  br label %loop4
loop4:
  %i6 = phi i64 [ 0, %loop1 ], [ %t98, %join9 ]
  %t7 = icmp slt i64 %i6, 2
  br i1 %t7, label %then8, label %else10
then8:
  store <8 x float> splat (float 0x0000000000000000), ptr %buf11, align 32
  %t12 = getelementptr float, ptr %buf11, i64 8
  store <8 x float> splat (float 0x0000000000000000), ptr %t12, align 32
  br label %loop13
loop13:
  %i15 = phi i64 [ 0, %then8 ], [ %t38, %loop13 ]
  %t16 = mul nsw i64 %i3, 10
  %t17 = add nsw i64 %t16, %i15
  %t18 = getelementptr float, ptr %arg0, i64 %t17
  %t19 = load float, ptr %t18, align 4
  %t20 = mul nsw i64 %i6, 8
  %t21 = mul nsw i64 %i15, 20
  %t22 = add nsw i64 %t20, %t21
  %t23 = getelementptr float, ptr %arg1, i64 %t22
  %t24 = load <8 x float>, ptr %t23, align 4
  %t25 = load <8 x float>, ptr %buf11, align 32
  %t26 = insertelement <8 x float> poison, float %t19, i64 0
  %t27 = shufflevector <8 x float> %t26, <8 x float> poison, <8 x i32> zeroinitializer
  %t28 = call <8 x float> @llvm.fma.v8f32(<8 x float> %t27, <8 x float> %t24, <8 x float> %t25)
  store <8 x float> %t28, ptr %buf11, align 32
  %t29 = getelementptr float, ptr %t18, i64 5
  %t30 = load float, ptr %t29, align 4
  %t31 = load <8 x float>, ptr %t23, align 4
  %t32 = getelementptr float, ptr %buf11, i64 8
  %t33 = load <8 x float>, ptr %t32, align 32
  %t34 = insertelement <8 x float> poison, float %t30, i64 0
  %t35 = shufflevector <8 x float> %t34, <8 x float> poison, <8 x i32> zeroinitializer
  %t36 = call <8 x float> @llvm.fma.v8f32(<8 x float> %t35, <8 x float> %t31, <8 x float> %t33)
  %t37 = getelementptr float, ptr %buf11, i64 8
  store <8 x float> %t36, ptr %t37, align 32
  %t38 = add nuw nsw i64 %i15, 1
  %t39 = icmp slt i64 %t38, 5
  br i1 %t39, label %loop13, label %done14
done14:
  %t40 = load <8 x float>, ptr %buf11, align 32
  %t41 = mul nsw i64 %i3, 40
  %t42 = mul nsw i64 %i6, 8
  %t43 = add nsw i64 %t41, %t42
  %t44 = getelementptr float, ptr %arg2, i64 %t43
  store <8 x float> %t40, ptr %t44, align 4
  %t45 = getelementptr float, ptr %buf11, i64 8
  %t46 = load <8 x float>, ptr %t45, align 32
  %t47 = getelementptr float, ptr %t44, i64 20
  store <8 x float> %t46, ptr %t47, align 4
  br label %join9
else10:
  store <8 x float> splat (float 0x0000000000000000), ptr %buf11, align 32
  %t48 = getelementptr float, ptr %buf11, i64 8
  store <8 x float> splat (float 0x0000000000000000), ptr %t48, align 32
  br label %loop49
loop49:
  %i51 = phi i64 [ 0, %else10 ], [ %t83, %loop49 ]
  %t52 = mul nsw i64 %i6, 8
  %t53 = insertelement <8 x i64> poison, i64 %t52, i64 0
  %t54 = shufflevector <8 x i64> %t53, <8 x i64> poison, <8 x i32> zeroinitializer
  %t55 = add <8 x i64> %t54, <i64 0, i64 1, i64 2, i64 3, i64 4, i64 5, i64 6, i64 7>
  %t56 = icmp slt <8 x i64> %t55, splat (i64 20)
  %t57 = mul nsw i64 %i3, 10
  %t58 = add nsw i64 %t57, %i51
  %t59 = getelementptr float, ptr %arg0, i64 %t58
  %t60 = load float, ptr %t59, align 4
  %t61 = mul nsw i64 %i51, 20
  %t62 = add nsw i64 %t52, %t61
  %t63 = getelementptr float, ptr %arg1, i64 %t62
  %t64 = call <8 x float> @llvm.masked.load.v8f32.p0(ptr align 4 %t63, <8 x i1> %t56, <8 x float> zeroinitializer)
  %t65 = load <8 x float>, ptr %buf11, align 32
  %t66 = insertelement <8 x float> poison, float %t60, i64 0
  %t67 = shufflevector <8 x float> %t66, <8 x float> poison, <8 x i32> zeroinitializer
  %t68 = call <8 x float> @llvm.fma.v8f32(<8 x float> %t67, <8 x float> %t64, <8 x float> %t65)
  %t69 = load <8 x float>, ptr %buf11, align 32
  %t70 = select <8 x i1> %t56, <8 x float> %t68, <8 x float> %t69
  store <8 x float> %t70, ptr %buf11, align 32
  %t71 = getelementptr float, ptr %t59, i64 5
  %t72 = load float, ptr %t71, align 4
  %t73 = call <8 x float> @llvm.masked.load.v8f32.p0(ptr align 4 %t63, <8 x i1> %t56, <8 x float> zeroinitializer)
  %t74 = getelementptr float, ptr %buf11, i64 8
  %t75 = load <8 x float>, ptr %t74, align 32
  %t76 = insertelement <8 x float> poison, float %t72, i64 0
  %t77 = shufflevector <8 x float> %t76, <8 x float> poison, <8 x i32> zeroinitializer
  %t78 = call <8 x float> @llvm.fma.v8f32(<8 x float> %t77, <8 x float> %t73, <8 x float> %t75)
  %t79 = getelementptr float, ptr %buf11, i64 8
  %t80 = load <8 x float>, ptr %t79, align 32
  %t81 = select <8 x i1> %t56, <8 x float> %t78, <8 x float> %t80
  %t82 = getelementptr float, ptr %buf11, i64 8
  store <8 x float> %t81, ptr %t82, align 32
  %t83 = add nuw nsw i64 %i51, 1
  %t84 = icmp slt i64 %t83, 5
  br i1 %t84, label %loop49, label %done50
done50:
  %t85 = mul nsw i64 %i6, 8
  %t86 = insertelement <8 x i64> poison, i64 %t85, i64 0
  %t87 = shufflevector <8 x i64> %t86, <8 x i64> poison, <8 x i32> zeroinitializer
  %t88 = add <8 x i64> %t87, <i64 0, i64 1, i64 2, i64 3, i64 4, i64 5, i64 6, i64 7>
  %t89 = icmp slt <8 x i64> %t88, splat (i64 20)
  %t90 = load <8 x float>, ptr %buf11, align 32
  %t91 = mul nsw i64 %i3, 40
  %t92 = mul nsw i64 %i6, 8
  %t93 = add nsw i64 %t91, %t92
  %t94 = getelementptr float, ptr %arg2, i64 %t93
  call void @llvm.masked.store.v8f32.p0(<8 x float> %t90, ptr align 4 %t94, <8 x i1> %t89)
  %t95 = getelementptr float, ptr %buf11, i64 8
  %t96 = load <8 x float>, ptr %t95, align 32
  %t97 = getelementptr float, ptr %t94, i64 20
  call void @llvm.masked.store.v8f32.p0(<8 x float> %t96, ptr align 4 %t97, <8 x i1> %t89)
  br label %join9
join9:
  %t98 = add nuw nsw i64 %i6, 1
  %t99 = icmp slt i64 %t98, 3
  br i1 %t99, label %loop4, label %done5
done5:
  %t100 = add nuw nsw i64 %i3, 1
  %t101 = icmp slt i64 %t100, 3
  br i1 %t101, label %loop1, label %done2
done2:
  ret i32 0
}

declare <8 x float> @llvm.fma.v8f32(<8 x float>, <8 x float>, <8 x float>)
declare <8 x float> @llvm.masked.load.v8f32.p0(ptr, <8 x i1>, <8 x float>)
declare void @llvm.masked.store.v8f32.p0(<8 x float>, ptr, <8 x i1>)

attributes #0 = { nounwind "no-builtins" "tune-cpu"="x86-64-v3" "prefer-vector-width"="256" "min-legal-vector-width"="256" }

!llvm.module.flags = !{!0, !1}
!0 = !{i32 8, !"PIC Level", i32 2}
!1 = !{i32 7, !"uwtable", i32 0}
